"""Rotary embedding: the bits of transformers' own, gradients against float64, and whose function a model calls."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from experiments.models import rotary

THEIRS = {
    module: getattr(module.apply_rotary_pos_emb, "on_other_devices", module.apply_rotary_pos_emb)
    for module in (modeling_llama, modeling_qwen3, modeling_gemma3)
}
SMALL = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def tensors(dtype: torch.dtype, tokens: int = 5, d: int = 16) -> list[torch.Tensor]:
    """q and k as a model has them, [batch, tokens, heads, d] seen as [batch, heads, tokens, d], and cos and sin."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, tokens, heads, d, generator=generator).to(dtype).transpose(1, 2) for heads in (3, 1))
    angles = torch.randn(2, tokens, d // 2, generator=generator).repeat(1, 1, 2)
    return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]


def with_gradients(function, q, k, cos, sin) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outputs = function(*leaves, cos, sin)
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, dys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("theirs", THEIRS.values(), ids=lambda function: function.__module__.rsplit("_")[-1])
def test_bits_of_transformers(theirs, dtype):
    args = tensors(dtype)
    for got, want in zip(with_gradients(rotary.rotary, *args), with_gradients(theirs, *args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_before_heads(dtype):
    q, k, cos, sin = tensors(dtype)
    got = rotary.rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for have, want in zip(got, rotary.rotary(q, k, cos, sin), strict=True):
        assert torch.equal(have, want.transpose(1, 2))


def test_gradients():
    q, k, cos, sin = tensors(torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k: rotary.rotary(q, k, cos, sin), (q.requires_grad_(), k.requires_grad_())
    )


def test_of_a_model(monkeypatch):
    theirs = THEIRS[modeling_llama]
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", theirs)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    rotary.use_on_cpu(model)
    ours = modeling_llama.apply_rotary_pos_emb
    assert ours.on_other_devices is theirs
    rotary.use_on_cpu(model)
    assert modeling_llama.apply_rotary_pos_emb is ours  # once
    called = []
    monkeypatch.setattr(rotary, "rotary", lambda *args, **kwargs: called.append(args) or theirs(*args, **kwargs))
    model(input_ids=torch.arange(6).unsqueeze(0))
    assert len(called) == 1
    meta = [x.to("meta") for x in tensors(torch.float32)]
    assert ours(*meta)[0].is_meta and len(called) == 1


def test_another_formula_is_told_apart():
    """GLM turns neighbours, and half of the dimensions only."""
    assert not rotary._computes_the_same(modeling_glm.apply_rotary_pos_emb)
