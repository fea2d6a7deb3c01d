"""An adapter knows its base from others of the same shapes, packed or dense, in bf16 or fp32."""

import copy
import warnings

import pytest
import torch

from modules import attach, detach, load_adapter, quantize, save_adapter
from modules.adapters.base_print import OtherBase, base_print
from tests.modules.architectures import dense_model


def other(name: str):
    model = dense_model(name)
    block = (model.model.layers if name == "llama" else model.transformer.h)[1]
    with torch.no_grad():
        next(parameter for parameter in block.parameters() if parameter.dim() == 2).mul_(1.5)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [False, True])
def test_another_base_is_noticed(tmp_path, name, packed):
    model, changed = dense_model(name), other(name)
    if packed:
        quantize(model)
        quantize(changed)
    attach(model, "dora", rank=4)
    save_adapter(model, tmp_path)
    detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherBase)
        load_adapter(model, tmp_path)
        load_adapter(copy.deepcopy(model), tmp_path, name="second")
    with pytest.warns(OtherBase, match="was trained on another base model of the same shapes"):
        load_adapter(changed, tmp_path)


@pytest.mark.parametrize("method", [{"adapter": "bitfit"}, {"adapter": "lora", "modules_to_save": ["embed_tokens"]}])
def test_the_base_that_was_trained_on_is_the_same_in_every_form(tmp_path, method):
    model = dense_model("llama")
    attach(model, **{"rank": 4} | method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_adapter(model, tmp_path)
    forms = [dense_model("llama"), dense_model("llama").bfloat16(), dense_model("llama").half(), dense_model("llama")]
    quantize(forms[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherBase)
        for form in forms:
            load_adapter(form, tmp_path)


def test_codes_of_rounded_weights_are_those_of_the_same_base(tmp_path):
    model, rounded = dense_model("llama"), dense_model("llama").bfloat16()
    for one in (model, rounded):
        quantize(one)
    attach(model, "lora", rank=4)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherBase)
        load_adapter(rounded, tmp_path)


def test_without_values_there_is_no_fingerprint():
    assert base_print(dense_model("llama").to("meta")) == {}
    assert base_print(torch.nn.Sequential(torch.nn.Linear(4, 4))) == {}
