"""Architectures of the survey, one of each kind that was once wrong; `python -m tests.survey` has all of them."""

import json

import pytest
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from experiments.config import resolve
from experiments.runs.finished import load_run
from experiments.runs.one_run import run
from experiments.system.cli import composed
from tests.survey.__main__ import survey
from tests.survey.life import arguments, difference, logits, save_small

KINDS = [
    ("gpt_neox", "qlora", ""),  # turns a part of each head; its head has another name in files
    ("falcon", "dora", ""),  # changes the result of its MLP in place; linears of a class of its own
    ("llama4_text", "lora", "router (2): its class computes more"),  # returns a pair
    ("qwen4_exp_text", "lora", ""),  # turns queries alone; bitsandbytes' names end twice in `weight`
    ("bamba", "qdora", "out_proj (1): the model's code reads its weight"),
    ("qwen2_moe", "qdora", ""),  # a gate of one row; experts in one tensor
    ("gpt_oss", "qlora", ""),  # experts with biases, whose weights are turned
    ("longcat_flash", "lora", "experts of a class not known here"),
]
REFUSED = {  # neither can transformers read of these what it packs and writes itself
    "falcon": "to=bnb4: transformer.h.0.self_attention.query_key_value is a FalconLinear",
}


SETTINGS = ["init=qpissa_iter_1", "exclude_modules=[experts]", "trainer.checkpoint_every=1"]


@pytest.fixture(autouse=True)
def hydra_anew():
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("model_type, method, left_out", KINDS, ids=[kind[0] for kind in KINDS])
def test_a_life(tmp_path, model_type, method, left_out):
    cells, said = survey(model_type, [method], tmp_path)
    assert cells[method].startswith(f"refused: {REFUSED[model_type]}" if model_type in REFUSED else "ok"), cells
    assert left_out in said


def test_a_base_of_its_own_is_read_back(tmp_path):
    """Of a model with packed experts."""
    directory, out = save_small("qwen3_moe", tmp_path), tmp_path / "out"
    run(resolve(composed(*arguments(directory, "qlora", out), *SETTINGS)))
    assert any(name.endswith("experts.down_proj.weight.absmax") for name in load_file(out / "base/model.safetensors"))
    trained = logits(load_run(out).model)
    assert difference(logits(load_run(next((out / "checkpoints").iterdir())).model), trained) < 1e-6
    GlobalHydra.instance().clear()
    run(resolve(composed(*arguments(directory, "qlora", out), *SETTINGS, f"resume={out}", "trainer.steps=2")))
    assert json.loads((out / "result.json").read_text())["steps"] == 2
