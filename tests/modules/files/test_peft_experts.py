"""Adapters of experts on disk: PEFT computes the same with them, and with its own; DoRA in a file of ours."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from modules import attach, detach, load_adapter, quantize, save_adapter
from modules.files.baselines import OUR_CONFIG_FILE
from tests.modules.architectures import scramble
from tests.modules.moe_cases import experts_of, moe_model, outputs

MODELS = ("qwen3_moe", "gpt_oss", "llama4_text", "nemotron_h")
FIRST = "the first projection"
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.mark.parametrize("targets", ["all-linear", ["experts"], ["down_proj"], FIRST])
@pytest.mark.parametrize("kind", MODELS)
def test_peft_computes_the_same_logits(tmp_path, kind, targets):
    model = moe_model(kind)
    if targets == FIRST:
        targets = ["q_proj", "up_proj" if kind == "nemotron_h" else "gate_up_proj"]
    base, before = copy.deepcopy(model), outputs(model)
    attach(model, "lora", rank=4, lora_alpha=6, target_modules=targets, dropout=0.1)
    scramble(model)
    want = outputs(model.eval())
    assert (want - before).abs().max() > 1e-3
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(outputs(theirs), want, **CLOSE)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    assert torch.equal(outputs(ours.eval()), want)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["experts.down_proj"], ["1.{}.gate_up_proj"]])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_a_file_of_peft_computes_the_same_logits(tmp_path, kind, parameters):
    model = moe_model(kind)
    module = "feed_forward.experts" if kind == "llama4_text" else "mlp.experts"
    asked = [name.format(module) for name in parameters]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=asked, rank_pattern={"down_proj": 2}
    )
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    assert len(experts_of(model)) == {2: 4, 1: 2 if "experts.down_proj" in asked else 1}[len(asked)]
    torch.testing.assert_close(outputs(model), outputs(theirs), **CLOSE)
    again = tmp_path / "again"
    save_adapter(model, again)
    written, first = (load_file(path / "adapter_model.safetensors") for path in (again, tmp_path))
    assert written.keys() == first.keys() and all(torch.equal(written[key], first[key]) for key in first)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_dora_has_a_file_of_its_own(tmp_path, kind):
    model = moe_model(kind)
    quantize(model)
    base = copy.deepcopy(model)
    attach(model, "dora", rank=4)
    scramble(model)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("adapter_model.safetensors", "checksums.json"),
        OUR_CONFIG_FILE,
    ]
    load_adapter(base, tmp_path)
    assert torch.equal(outputs(base), outputs(model))


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path, adapter):
    model = moe_model("qwen3_moe")
    attach(model, adapter, rank=4, target_modules=["experts"])
    save_adapter(model, tmp_path)
    detach(model)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (tmp_path / "checksums.json").unlink()
    lora_A = {key: tensor for key, tensor in tensors.items() if "lora_A" in key}
    save_file(tensors | {key: tensor[:3].clone() for key, tensor in lora_A.items()}, path)
    with pytest.raises(ValueError, match=r"experts|another model"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("parameters", [["mlp.experts.w1"], ["q_proj.weight"]])
def test_parameters_that_are_not_there_are_refused(tmp_path, parameters):
    model = moe_model("qwen3_moe")
    attach(model, "lora", rank=4)
    save_adapter(model, tmp_path)
    detach(model)
    (tmp_path / "checksums.json").unlink()
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": parameters}))
    with pytest.raises(ValueError, match=r"target_parameters: .* matches no experts of the model"):
        load_adapter(model, tmp_path)
