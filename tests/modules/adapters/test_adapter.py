"""Finding, packing and adapting the linears of a model."""

import pytest
import torch
from torch import nn

from modules import NF4Linear, adapted_linears, attach, decoder_linears, quantize
from modules.adapters.targets import match_targets
from modules.linear import dense_weight


def test_decoder_linears_leave_out_the_head(llama):
    names = decoder_linears(llama)
    assert len(names) == 14 and not any("lm_head" in name for name in names)


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


@pytest.mark.parametrize(
    "target_modules, count",
    [("all-linear", 14), (["q_proj"], 2), (["q_proj", "v_proj"], 4), (["layers.1.mlp.up_proj"], 1)]
    + [(r".*\.mlp\..*", 6), (r"model\.layers\.0\.self_attn\.(q|k)_proj", 2)],
    ids=str,
)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_attach_targets(llama, adapter, target_modules, count):
    names = attach(llama, adapter, rank=3, target_modules=target_modules)
    assert len(names) == count and set(adapted_linears(llama)) == set(names)
    trainable = {name for name, p in llama.named_parameters() if p.requires_grad}
    parts = ("lora_A", "lora_B") + (("magnitude",) if adapter == "dora" else ())
    assert trainable == {f"{name}.{part}" for name in names for part in parts}
    assert next(iter(adapted_linears(llama).values())).scaling == 2.0, "lora_alpha is 2 · rank by default"


def test_a_suffix_means_whole_parts_of_a_name():
    assert match_targets(["a.up_proj", "a.pup_proj", "up_proj"], ["up_proj"]) == ["a.up_proj", "up_proj"]


@pytest.mark.parametrize("target_modules", [["nope"], "nope", [], ["head"]], ids=str)
def test_nothing_matches(llama, target_modules):
    with pytest.raises(ValueError, match="matches no linear of the model; it has down_proj, gate_proj"):
        attach(llama, "lora", target_modules=target_modules)
    assert all(p.requires_grad for p in llama.parameters()), "the model is unchanged"


def test_not_a_regular_expression(llama):
    with pytest.raises(ValueError, match=r"target_modules='\(' is not a regular expression"):
        attach(llama, "lora", target_modules="(")


@pytest.mark.parametrize(
    "rank, message",
    [
        (0, "rank=0 is not a rank: choose a whole number, 1 or more"),
        (-4, "rank=-4 is not a rank"),
        (2.5, "rank=2.5 is not a rank"),
        (33, r"rank 33 is out of range: model.layers.0.self_attn.k_proj can have 1 to 32"),
    ],
)
def test_a_rank_one_layer_cannot_have(llama, rank, message):
    with pytest.raises(ValueError, match=message):
        attach(llama, "lora", rank=rank)
    assert not adapted_linears(llama) and all(p.requires_grad for p in llama.parameters()), "the model is unchanged"


def test_unknown_adapter(llama):
    with pytest.raises(ValueError, match="adapter 'vera' is not one of lora, dora"):
        attach(llama, "vera")


def test_a_model_without_linears_says_so():
    with pytest.raises(ValueError, match="matches no linear of the model"):
        attach(nn.Sequential(nn.Embedding(9, 4)), "lora")


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_compiles_without_a_graph_break(llama, adapter, quantized):
    if quantized:
        quantize(llama)
    attach(llama, adapter, rank=3)
    ids = torch.arange(10).view(2, 5)
    eager = llama(ids, use_cache=False).logits
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    compiled.sum().backward()
    assert all(linear.lora_B.grad is not None for linear in adapted_linears(llama).values())
