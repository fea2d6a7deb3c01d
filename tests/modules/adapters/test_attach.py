"""Attach adapters to a model: adapted linears, trained parameters, bad input, compilation."""

import pytest
import torch
from torch import nn

from modules import adapted_linears, attach, detach, quantize
from tests.modules.architectures import logits, scramble


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
        (65, r"rank 65 is out of range: model.layers.0.self_attn.q_proj can have 1 to 64"),
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


def test_a_part_of_a_model_has_adapters_of_its_own(base):
    plain = logits(base)
    attach(base.model.layers[0], "lora", 4)
    scramble(base.model.layers[0])
    shown = logits(base)
    assert (shown - plain).abs().max() > 1e-3 and len(adapted_linears(base)) == 7
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj has an adapter that was attached to a part"):
        attach(base, "lora", 4)
    attach(base.model.layers[1], "lora", 4)
    assert torch.equal(logits(base), shown)
    detach(base.model.layers[0])
    assert torch.equal(logits(base), plain)


def test_any_module_of_linears():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)))
    assert attach(model, "dora", 2, target_modules=r"2\..*") == ["2.0", "2.1"]
    assert attach(model, "lora", 2, target_modules=["0", "1"], name="other") == ["0", "2.0", "2.1"]
