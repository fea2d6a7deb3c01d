"""PEFT's models and files, and the error of load_adapter on a bad file."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modules import load_adapter
from tests.modules.architectures import dense_model, logits, scramble


def peft_model(base, **settings):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings)
    model = get_peft_model(base, config).eval()
    scramble(model)
    return model


def saved(tmp_path, architecture="llama", **settings):
    peft_model(dense_model(architecture), **settings).save_pretrained(tmp_path)
    return tmp_path / "adapter_config.json"


def refusal(model, directory, **kwargs) -> str:
    """The error of load_adapter, after which `model` must be as before."""
    before, plain = logits(model), dict(model.named_parameters())
    with pytest.raises(ValueError) as error:
        load_adapter(model, directory, **kwargs)
    assert torch.equal(logits(model), before) and dict(model.named_parameters()).keys() == plain.keys()
    assert all(parameter is plain[name] for name, parameter in model.named_parameters())
    return str(error.value)
