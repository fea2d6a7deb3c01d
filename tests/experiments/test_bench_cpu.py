"""The comparison on a CPU: both sides learn alike, what differs gets no ratio. Nothing here asserts a time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.bench_cpu import __main__ as bench
from experiments.bench_cpu.plot import plot
from experiments.errors import UserError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    config = LlamaConfig(
        **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    )
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_both_sides_learn_alike_and_what_differs_gets_no_ratio(model_dir, monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    case = bench.Case("qdora", rank=4, batch=2, length=16, model="tiny")
    tokens = torch.randint(128, (3 * 2 * 16,))
    monkeypatch.setattr(bench, "NEW_TOKENS", 2)
    pair = bench.Pair(case, model_dir, "float32", threads=1)
    try:
        rows = bench.compare(case, pair, tokens, "float32", steps=2, generates=True)
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
    assert "losses agree; products alone" in capsys.readouterr().out
    plot(tmp_path / "sub" / "cpu.png", rows)
    assert (tmp_path / "sub" / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_worker_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"Unrecognized model in .*test_a_worker_that_fails"):
        bench.Pair(bench.Case("lora"), tmp_path, "float32", threads=1)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["full"], "nothing matches full"), (["--steps", "0"], "at least 1")]
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
