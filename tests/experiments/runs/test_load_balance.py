"""The tokens that experts get, against the routers' own logits; the files and lines of a run."""

import csv

import pytest
import torch

from experiments.data.chat import IGNORED, Example
from experiments.models.tiny import byte_tokenizer
from experiments.runs import load_balance
from experiments.training.evaluation import evaluate_each
from experiments.training.expert_load import ExpertLoad
from modules import attach
from tests.experiments.helpers import TINY, result, write_chats
from tests.modules.moe_cases import moe_model
from tests.survey.small import build

LENGTHS = (5, 9, 3, 7)  # so that rows are padded


def samples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Example(row, [IGNORED] + row[1:]) for row in rows]


def by_router(model, k: int) -> dict[str, list[int]]:
    """The same counts of samples without padding, from the logits of the model's routers."""
    layers = [name for name, module in model.named_modules() if name.endswith("experts")]
    counts = {name: torch.zeros(4, dtype=torch.int64) for name in layers}
    for sample in samples():
        ids = torch.tensor([sample.input_ids])
        logits = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
        for name, of_layer in zip(layers, logits, strict=True):
            for token in of_layer.view(-1, 4):
                for expert in token.topk(k).indices:
                    counts[name][expert] += 1
    return {name: of_layer.tolist() for name, of_layer in counts.items()}


@pytest.mark.parametrize("taken_over", [False, True], ids=["transformers", "ours"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"])
def test_counts_are_those_of_the_router(kind, taken_over):
    model = moe_model(kind)
    k = model.config.num_experts_per_tok
    want = by_router(model, k)
    if taken_over:
        attach(model, "lora", rank=2)  # a new adapter changes nothing
    load = ExpertLoad(model)
    evaluate_each(model, samples(), 2, 0, load=load)
    found = load.total()
    assert found == want and all(sum(counts) == k * sum(LENGTHS) for counts in found.values()) and len(found) == 2
    assert not any(layer._forward_pre_hooks for layer in load.layers.values())


def test_rows_and_summary():
    rows = load_balance.rows({"layers.0.experts": [6, 0, 2, 0], "layers.1.experts": [2, 2, 2, 2]})
    assert [list(row.values()) for row in rows] == [
        ["layers.0.experts", 4, 3.0, 2, "0.75 0 0.25 0"],
        ["layers.1.experts", 4, 1.0, 0, "0.25 0.25 0.25 0.25"],
    ]
    assert load_balance.summary(rows) == {"expert_imbalance": 2.0, "experts_without_tokens": 2}
    assert load_balance.summary([]) == {}


def test_a_run_says_how_even_its_experts_are(command, tmp_path):
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "mixture")
    byte_tokenizer(model.config.vocab_size).save_pretrained(tmp_path / "mixture")
    given = [*TINY, "model=hf", f"model.path={tmp_path / 'mixture'}", "data=jsonl", "+method=lora", "lr=3e-2"]
    given += [f"data.path={write_chats(tmp_path)}", "trainer.samples=0", "trainer.steps=4", "trainer.eval_every=2"]
    given += ["trainer.keep_best=true", "trainer.checkpoint_every=2"]
    code, text = command(*given, f"output_dir={tmp_path / 'run'}")
    found = result(tmp_path / "run")
    assert code == 0 and f"experts: the busiest of a layer has {found['expert_imbalance']:.1f} times" in text, text
    with (tmp_path / "run" / "experts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    assert all(sum(map(float, row["shares"].split())) == pytest.approx(1, abs=1e-3) for row in rows)
    assert found["experts_without_tokens"] == sum(int(row["without_tokens"]) for row in rows)
    assert "experts" in text and (tmp_path / "run" / "checksums.json").read_text().count("experts.csv") == 1
