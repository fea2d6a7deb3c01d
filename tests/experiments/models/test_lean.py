"""Norms and gated MLPs that keep less: what the model's own code gives, gradients against float64."""

import copy

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from experiments.models import lean
from modules import attach, quantize

SMALL = {
    **{"vocab_size": 101, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def gradients(function, leaves: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["rms_norm", "silu", "gelu_pytorch_tanh"])
def test_against_float64(what, dtype):
    torch.manual_seed(0)
    if what == "rms_norm":
        norm = LlamaRMSNorm(33, eps=1e-3).requires_grad_(False)
        norm.weight.normal_()
        leaves, dy = [torch.randn(2, 5, 33)], torch.randn(2, 5, 33)
        own = lambda x: norm.to(x.dtype)(x)  # noqa: E731
        ours = lambda x: lean._rms_norm(norm.to(x.dtype), x)  # noqa: E731
        exact = lambda x: norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)  # noqa: E731
    else:
        leaves, dy = [torch.randn(7, 33) for _ in range(2)], torch.randn(7, 33)
        own = exact = lambda gate, up: ACT2FN[what](gate) * up
        ours = lambda gate, up: lean._Gated.apply(gate, up, lean._Product(ACT2FN[what]))  # noqa: E731
    leaves = [leaf.to(dtype) for leaf in leaves]
    got, theirs = gradients(ours, leaves, dy), gradients(own, leaves, dy)
    if dtype == torch.float32:
        assert torch.equal(got[0], theirs[0])
    assert (got[0] - theirs[0]).abs().max() <= torch.finfo(dtype).eps * theirs[0].abs().max()
    if what == "rms_norm":
        norm.double()
    for have, torchs, want in zip(got, theirs, gradients(exact, [leaf.double() for leaf in leaves], dy.to(dtype))):
        allowed = 2 * (torchs - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (have - want).abs().max() <= allowed


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Qwen3ForCausalLM], ids=lambda c: c.__name__)
def test_of_a_model(model_class):
    torch.manual_seed(0)
    config = (LlamaConfig if model_class is LlamaForCausalLM else Qwen3Config)(**SMALL)
    theirs = model_class(config).requires_grad_(False)
    ours = copy.deepcopy(theirs)
    lean.use_on_cpu(ours)
    replaced = {type(module).__name__ for module in ours.modules() if "forward" in module.__dict__}
    assert {name.removeprefix("Llama").removeprefix("Qwen3") for name in replaced} == {"RMSNorm", "MLP"}
    input_ids, losses = torch.randint(101, (2, 9)), []
    for model in (theirs, ours, copied := copy.deepcopy(ours)):
        quantize(model)
        torch.manual_seed(1)
        attach(model, "dora", 4)
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=1e-5, atol=0)
    for model in (ours, copied):
        assert model.model.norm.forward.__self__ is model.model.norm
        for have, want in zip(model.parameters(), theirs.parameters()):
            if want.requires_grad:
                torch.testing.assert_close(have.grad, want.grad, rtol=1e-4, atol=1e-6)


def test_compiles():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).requires_grad_(False)
    lean.use_on_cpu(model)
    attach(model, "dora", 4)
    input_ids = torch.randint(101, (2, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = (run(input_ids=input_ids, use_cache=False).logits for run in (compiled, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_computes_something_else_is_left_alone():
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL))  # its norms multiply with 1 + w
    nn.init.normal_(model.model.norm.weight)
    lean.use_on_cpu(model)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__ and "norm" in name]


def test_a_norm_that_trains_gets_its_gradient():
    norm = LlamaRMSNorm(8)
    x = torch.randn(3, 8)
    norm(x).sum().backward()
    want, norm.weight.grad = norm.weight.grad, None
    lean._rms_norm_or_own(norm, x).sum().backward()
    torch.testing.assert_close(norm.weight.grad, want)


def test_checkpointing_decides_what_is_kept():
    """A hook of our own inside its hooks would hold what feeds the product, of every block at once."""
    mlp = LlamaForCausalLM(LlamaConfig(**SMALL)).model.layers[0].mlp
    x, kept = torch.randn(2, 5, 64, requires_grad=True), []
    product = lean._Gated.apply(mlp.gate_proj(x), mlp.up_proj(x), lean._Product(mlp.act_fn))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lean._mlp(mlp, x)
    assert any(torch.equal(tensor.flatten(), product.flatten()) for tensor in kept)
