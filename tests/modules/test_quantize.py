"""Pack and unpack the linears of a model, with and without adapters."""

import pytest
import torch
from torch import nn

from modules import (
    NF4Linear,
    adapted_linears,
    attach,
    decoder_linears,
    dequantize,
    detach,
    merge,
    quantize,
    set_adapter,
    trainable_parameters,
)
from modules.linear import dense_weight, is_conv1d
from tests.modules.architectures import dense_model, logits, scramble
from tests.modules.baseline_cases import with_baseline


def test_quantize_packs_every_decoder_linear_and_nothing_else(llama):
    dense = {name: linear.weight.clone() for name, linear in decoder_linears(llama).items()}
    quantize(llama, blocksize=64, double_quant=True)
    packed = decoder_linears(llama)
    assert all(isinstance(linear, NF4Linear) for linear in packed.values())
    assert type(llama.lm_head) is nn.Linear and type(llama.model.embed_tokens) is nn.Embedding
    for name, linear in packed.items():
        # half the widest gap between NF4 levels, 0.152, times the block's absmax, bounds the error
        assert (dense_weight(linear) - dense[name]).abs().max() <= 0.16 * dense[name].abs().max()
    assert llama(torch.arange(5)[None]).logits.isfinite().all()


def test_quantize_releases_each_dense_weight_as_it_goes(llama):
    alive = []

    def progress(names):
        for name in names:
            yield name
            alive.append(sum(type(linear) is nn.Linear for linear in decoder_linears(llama).values()))

    quantize(llama, progress=progress)
    assert alive == list(range(13, -1, -1))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dequantize_undoes_quantize_but_for_rounding(architecture):
    model = dense_model(architecture)
    quantize(model)
    expected = logits(model)
    dequantize(model)
    kinds = {is_conv1d(linear) for linear in decoder_linears(model).values()}
    assert kinds == {architecture == "gpt2"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_quantize_reaches_the_base_under_adapters():
    model, packed = dense_model("llama"), dense_model("llama")
    quantize(packed)
    plain = logits(packed)
    attach(model, "dora", 4, 6, name="a")
    scramble(model, 1)
    attach(model, "lora", 4, 6, ["q_proj"], name="b")
    quantize(model)
    set_adapter(model, "a")
    layers = adapted_linears(model)
    for name, layer in layers.items():
        assert torch.equal(layer.base.weight, packed.get_submodule(name).weight)
        torch.testing.assert_close(layer.norm_sq, dense_weight(layer.base).square().sum(1))
    merged = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), merged, rtol=1e-4, atol=1e-5)
    detach(model)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_packing_after_attaching(architecture):
    """OPT's MLP is linears of the block itself, which a prefix puts another in the place of."""
    for adapter in ("houlsby", "prefix_layer"):
        settings = {"prefix_tokens": 3} if adapter == "prefix_layer" else {"rank": 3}
        model = with_baseline(architecture, adapter, **settings)
        quantize(model)
        expected = with_baseline(architecture, adapter, packed=True, **settings)
        if adapter == "prefix_layer":  # it starts with activations, which packing changes
            for p, q in zip(trainable_parameters(model).values(), trainable_parameters(expected).values()):
                q.data.copy_(p)
        assert torch.equal(logits(model), logits(expected))
        detach(model), detach(expected)
        assert torch.equal(logits(model), logits(expected))


def test_a_base_that_adapters_share_is_not_packed_for_one_of_them():
    model = dense_model("llama")
    attach(model, "lora", 4, init="qpissa", name="one")
    attach(model, "lora", 4, name="two")
    with pytest.raises(ValueError, match="init=qpissa of the adapter 'one' changes the base: detach the other"):
        quantize(model)
    assert not any(isinstance(linear, NF4Linear) for linear in decoder_linears(model).values())


def test_quantizing_under_an_own_bias():
    model = dense_model("opt")
    attach(model, "lora", 4, target_modules=["q_proj"], bias="all")
    with pytest.raises(ValueError, match=r"an adapter trains .*k_proj itself, or its bias: quantize before attaching"):
        quantize(model)
