"""Merge, unmerge and unload adapters, and add them up."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modules import (
    NF4Linear,
    adapted_linears,
    adapters,
    add_weighted_adapter,
    attach,
    decoder_linears,
    detach,
    merge,
    quantize,
    set_adapter,
    unmerge,
)
from modules.linear import dense_weight
from tests.modules.architectures import ARCHITECTURES, dense_model, logits, scramble


def adapted(architecture, method="lora", **settings):
    model = dense_model(architecture)
    if method.startswith("q"):
        quantize(model)
    attach(model, method.removeprefix("q"), 4, 6, **settings)
    scramble(model)
    return model


@pytest.mark.parametrize(
    "architecture, method",
    [("llama", method) for method in ("lora", "qlora", "dora", "qdora")]
    + [(architecture, method) for architecture in ARCHITECTURES[1:] for method in ("dora", "qlora")],
)
def test_a_merged_model_is_a_plain_one(architecture, method, tmp_path):
    model = adapted(architecture, method, init="pissa", modules_to_save=["lm_head"], bias="all")
    expected, attached = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    requantized = merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not adapted_linears(model) and not any(isinstance(m, NF4Linear) for m in model.modules())
    assert set(requantized) == (set(decoder_linears(model)) if method.startswith("q") else set())
    unmerge(model)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, attached[name]) for name, tensor in model.state_dict().items())

    merge(model, unload=True)
    assert not adapters(model)
    assert {type(linear) for linear in decoder_linears(model).values()} == {
        type(linear) for linear in decoder_linears(dense_model(architecture)).values()
    }
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_requantizing_is_measured():
    model = adapted("llama", "qdora")
    base = {name: dense_weight(layer.base).double() for name, layer in adapted_linears(model).items()}
    requantized = merge(model, unload=True)
    merged = {name: linear.weight.double() for name, linear in decoder_linears(model).items()}
    quantize(model)
    for name, linear in decoder_linears(model).items():
        size, found = merged[name].norm(), requantized[name]
        error = (dense_weight(linear).double() - merged[name]).norm() / size
        assert found.error == pytest.approx(error.item(), rel=1e-4)
        assert found.update == pytest.approx(((merged[name] - base[name]).norm() / size).item(), rel=1e-4)


def test_merged_in_the_dtype_of_the_base():
    model = dense_model("llama").to(torch.bfloat16)
    quantize(model)
    attach(model, "lora", 4, 6, ["q_proj"], modules_to_save=["lm_head"], bias="all")
    merge(model, unload=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(model.model.layers[0].self_attn.k_proj, NF4Linear), "linears without an adapter stay packed"


def test_a_tied_head_that_changed_is_no_longer_tied(tmp_path):
    model = adapted("llama", target_modules=["lm_head"])
    assert model.config.tie_word_embeddings
    expected = logits(model)
    merge(model)
    assert not model.config.tie_word_embeddings
    unmerge(model)
    assert model.config.tie_word_embeddings and model.lm_head.base.weight is model.model.embed_tokens.weight
    merge(model, unload=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_merging_at_the_wrong_time_is_refused():
    model = dense_model("llama")
    for call, message in (
        (merge, "the model has no adapter in use; it has none"),
        (unmerge, "no adapter of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            call(model)
    attach(model, "lora", 4)
    merge(model)
    with pytest.raises(ValueError, match="the adapter 'default' is merged already"):
        merge(model)
    with pytest.raises(ValueError, match=r"the adapter is merged: unmerge\(model\), or merge\(model, unload=True\)"):
        quantize(model)
    detach(model)
    assert logits(model).equal(logits(dense_model("llama")))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weighted_sum(architecture):
    """W + Σ w·sBA, in float64."""
    model = dense_model(architecture)
    dense = {name: dense_weight(linear).detach().double() for name, linear in decoder_linears(model).items()}
    attach(model, "lora", 4, 6, name="a", rslora=True)
    scramble(model, 1)
    suffix = "c_attn" if architecture == "gpt2" else "q_proj"
    attach(model, "lora", 3, 9, [suffix], name="b", init="pissa")
    scramble(model, 2)
    weights = {"a": 0.7, "b": -0.4}
    expected = {name: weight.clone() for name, weight in dense.items()}
    for part, weight in weights.items():
        set_adapter(model, part)
        for name, layer in adapted_linears(model).items():
            expected[name] += weight * (layer.merged_weight().double() - dense[name])
    names = add_weighted_adapter(model, weights, "mix")
    assert adapters(model).keys() == {"a", "b", "mix"} and set(names) == set(dense)
    for name, layer in adapted_linears(model).items():
        assert layer.rank == (10 if name.endswith(suffix) else 4) and layer.scaling == 1
        torch.testing.assert_close(layer.merged_weight().double(), expected[name], rtol=1e-5, atol=1e-6)
    set_adapter(model, "a")
    before = logits(model)
    add_weighted_adapter(model, {"a": 1.0}, "same")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"adapter": "dora"}, "the adapter 'a' has dora, which cannot be summed: only LoRA layers can"),
        ({"modules_to_save": ["lm_head"]}, "the adapter 'a' has modules_to_save, which cannot be summed"),
        ({"bias": "lora_only"}, "the adapter 'a' has bias, which cannot be summed"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_summed_are_refused(settings, message):
    model = dense_model("llama")
    attach(model, **{"adapter": "lora", "rank": 4, "name": "a"} | settings)
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(model, {"a": 1.0}, "mix")
    for weights, problem in (({}, "no adapter to add"), ({"b": 1.0}, "the model has no adapter 'b'; it has a")):
        with pytest.raises(ValueError, match=problem):
            add_weighted_adapter(model, weights, "mix")
    assert adapters(model).keys() == {"a"}
