"""Own copies and BitFit: shared tensors, trained tensors, and their precision."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn

from modules import NF4Linear, attach, detach, merge, quantize, set_adapter, trainable_parameters, unmerge
from modules.adapters.own import merged_copy, own_copy, own_tensor
from modules.adapters.targets import all_linears
from modules.linear import dense_weight
from tests.modules.architectures import ARCHITECTURES, dense_model, logits, scramble


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "module, x",
    [(nn.Linear(8, 6), torch.randn(3, 8)), (nn.LayerNorm(8), torch.randn(3, 8)), (nn.Embedding(5, 8), torch.arange(5))],
    ids=["linear", "norm", "embedding"],
)
def test_an_own_weight_trains_in_fp32_and_computes_in_the_base_s_dtype(module, x, dtype):
    base = copy.deepcopy(module).to(dtype).requires_grad_(False)
    x = x.to(dtype) if x.is_floating_point() else x
    before = base(x)
    clone = own_copy(base, ["weight"])
    assert isinstance(clone, type(base)) and torch.equal(clone(x), before) and clone(x).dtype == dtype
    own = own_tensor(clone, "weight")
    assert own.dtype == torch.float32 and [p.requires_grad for p in clone.parameters()].count(True) == 1
    if hasattr(base, "bias"):
        assert clone.bias is base.bias
    clone(x).float().square().sum().backward()
    assert own.grad.dtype == torch.float32 and own.grad.any()
    with torch.no_grad():
        own.add_(1e-4)  # less than bf16 can add to 1
    assert torch.equal(base(x), before)
    assert torch.equal(merged_copy(base, clone, ["weight"])(x), clone(x))
    assert merged_copy(base, clone, ["weight"]).weight.dtype == dtype


def test_a_forward_set_on_the_instance_uses_the_own_weight():
    base = nn.Linear(8, 6)
    base.forward = MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias), base)
    clone, x = own_copy(base, ["weight"]), torch.randn(3, 8)
    before = base(x)
    with torch.no_grad():
        clone.weight.add_(1)
    assert torch.equal(base(x), before)
    torch.testing.assert_close(clone(x), before + 2 * x.sum(1, keepdim=True))
    torch.testing.assert_close(merged_copy(base, clone, ["weight"])(x), clone(x))


def test_buffers_are_copied_too():
    base = nn.BatchNorm1d(4)
    clone = own_copy(base, ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
    clone.train()(torch.randn(8, 4) + 3)
    assert not base.running_mean.any() and clone.running_mean.min() > 0.2


def test_bias_of_a_packed_linear():
    model = dense_model("opt")
    quantize(model)
    before = logits(model)
    attach(model, "lora", 4, target_modules=["q_proj"], bias="all")
    linear = model.model.decoder.layers[0].fc1
    assert isinstance(linear, NF4Linear) and linear.bias.requires_grad
    kinds = {name.rpartition(".")[2] for name in trainable_parameters(model)}
    assert kinds == {"lora_A", "lora_B", "bias"}
    scramble(model)
    assert (logits(model) - before).abs().max() > 1e-2
    set_adapter(model, None)
    assert torch.equal(logits(model), before)


def test_whole_modules_train_in_fp32_over_a_bf16_model():
    model = dense_model("llama").to(torch.bfloat16)
    before = logits(model)
    attach(model, "dora", 4, modules_to_save=["lm_head", "norm", "layers.1.mlp"], bias="all")
    assert not torch.equal(before, 0 * before) and logits(model).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    model(torch.arange(5)[None]).logits.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())
    scramble(model)
    detach(model)
    assert torch.equal(logits(model), before)


def test_a_packed_module_cannot_train_whole():
    model = dense_model("llama")
    quantize(model)
    with pytest.raises(ValueError, match=r"modules_to_save: .*\.mlp\.gate_proj is packed in NF4 and cannot"):
        attach(model, "lora", 4, target_modules=["q_proj"], modules_to_save=["mlp"])


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_compiled_with_an_own_head(adapter):
    model = dense_model("llama").to(torch.bfloat16)
    attach(model, adapter, 4, target_modules=["q_proj"], modules_to_save=["lm_head"], init="olora")
    head = torch.compile(model.lm_head, fullgraph=True, backend="aot_eager")
    layer = torch.compile(model.model.layers[0].self_attn.q_proj, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(head(x), model.lm_head(x))
    torch.testing.assert_close(layer(x), model.model.layers[0].self_attn.q_proj(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bitfit_trains_the_biases_and_nothing_else(architecture):
    model = dense_model(architecture)
    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".bias")}
    without = logits(model)
    attach(model, "bitfit")
    assert torch.equal(logits(model), without)
    trained = trainable_parameters(model)
    if biases:
        assert trained.keys() == biases.keys()
        assert all(torch.equal(trained[name], biases[name]) for name in biases)
    else:
        linears = [name for name, linear in all_linears(model).items() if linear is not model.lm_head]
        assert trained.keys() == {f"{name}.bias" for name in linears}
        assert not any(p.any() for p in trained.values())
    scramble(model)
    learned = logits(model)
    assert (learned - without).abs().max() > 1e-2
    merge(model)
    assert torch.equal(logits(model), learned) and not trainable_parameters(model)
    unmerge(model)
    detach(model)
    assert torch.equal(logits(model), without)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_bitfit_gives_a_linear_a_bias(packed):
    """Over bf16 weights the bias is fp32, and the layer computes xWᵀ + b in bf16."""
    model = dense_model("llama").bfloat16()
    if packed:
        quantize(model)
    base = model.model.layers[0].mlp.up_proj
    weight = dense_weight(base) if packed else base.weight
    attach(model, "bitfit")
    ours = model.model.layers[0].mlp.up_proj
    [bias] = [p for p in ours.parameters() if p.dim() == 1]
    assert bias.dtype == torch.float32 and bias.requires_grad and base.bias is None
    with torch.no_grad():
        bias.copy_(torch.linspace(-1, 1, len(bias)))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = x.double() @ weight.double().t() + bias.double()
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x).double(), expected, rtol=2**-7, atol=2**-7)
