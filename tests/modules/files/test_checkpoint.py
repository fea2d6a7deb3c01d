"""Adapters on disk: PEFT reads what we write, we read what PEFT writes, and nothing half-written is left."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from modules import adapted_linears, attach, load_adapter, quantize, save_adapter

IDS = torch.arange(21).view(3, 7)


@pytest.fixture
def base(llama):
    return llama.eval()


def trained(base, adapter="lora", target_modules="all-linear", **kwargs):
    """A copy of `base` with an adapter that changes what it computes."""
    model = copy.deepcopy(base)
    attach(model, adapter, rank=4, lora_alpha=6, target_modules=target_modules, **kwargs)
    torch.manual_seed(1)
    for linear in adapted_linears(model).values():
        nn.init.normal_(linear.lora_B, std=0.1)
        if adapter == "dora":
            nn.init.uniform_(linear.magnitude, 0.3, 0.9)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*layers\.1\..*proj"], ids=str)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_peft_computes_the_same_logits(base, tmp_path, adapter, targets):
    model = trained(base, adapter, targets, dropout=0.1)
    save_adapter(model, tmp_path, "some/base")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_what_peft_saved_computes_the_same_logits(base, tmp_path, adapter):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=adapter == "dora", init_lora_weights=False
    )
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    assert len(load_adapter(ours, tmp_path)) == 4
    torch.testing.assert_close(logits(ours.eval()), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_round_trip_over_nf4_is_exact(base, tmp_path, adapter):
    packed = copy.deepcopy(base)
    quantize(packed)
    model = trained(packed, adapter)
    save_adapter(model, tmp_path)
    again = copy.deepcopy(packed)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again.eval()), logits(model))


def test_no_adapter_to_save(base, tmp_path):
    with pytest.raises(ValueError, match="the model has no adapter to save"):
        save_adapter(base, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _damage(directory, how):
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "not JSON":
        config.write_text("{")
    elif how == "another rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 3}))
    elif how == "other layers":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj"]}))


@pytest.mark.parametrize(
    "how, message",
    [
        (
            "truncated",
            "holds no readable adapter: adapter_model.safetensors is damaged or not a safetensors file: Error",
        ),
        ("no weights", "adapter_model.safetensors is missing"),
        ("no config", "adapter_config.json is missing"),
        ("not JSON", "holds no readable adapter"),
        (
            "another rank",
            r"adapter_config.json and adapter_model.safetensors disagree: model.layers.0.self_attn.q_proj has rank 3 "
            r"in the first and 4 in the second; \S+k_proj has .*; \S+v_proj has .*; … 14 in all",
        ),
        (
            "other layers",
            r"another model: model.layers.\S+lora_A.weight is in the file, but adapter_config.json puts no",
        ),
    ],
)
def test_damaged_adapters_are_refused(base, tmp_path, how, message):
    save_adapter(trained(base), tmp_path)
    _damage(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        load_adapter(copy.deepcopy(base), tmp_path)
