"""Rotary embedding: the bits of transformers' own, gradients against float64, both orders of dimensions, bad input."""

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from kernels import rotary
from kernels.cpu import threads
from tests.kernels.op_cases import HALF_ULP, assert_compiles, bf16, with_gradients

NAME = "apply_rotary_pos_emb"


def own_function(module):
    """The function of a module of transformers, also where a fused model has ours in its place."""
    function = getattr(module, NAME)
    return getattr(function, "own", function)


THEIRS = [own_function(module) for module in (modeling_llama, modeling_qwen3, modeling_gemma3)]


def tensors(dtype: torch.dtype, tokens: int = 5, d: int = 16) -> list[torch.Tensor]:
    """q and k as a model has them, [batch, tokens, heads, d] seen as [batch, heads, tokens, d], and cos and sin."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, tokens, heads, d, generator=generator).to(dtype).transpose(1, 2) for heads in (3, 1))
    angles = torch.randn(2, tokens, d // 2, generator=generator).repeat(1, 1, 2)
    return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]


def results(function, q, k, cos, sin) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (q, k)]
    return with_gradients(lambda q, k: function(q, k, cos, sin), (q, k), *dys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("theirs", THEIRS, ids=lambda function: function.__module__.rsplit("_")[-1])
def test_bits_of_transformers(backend, theirs, dtype):
    args = tensors(dtype)
    for got, want in zip(results(rotary, *args), results(theirs, *args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_before_heads(backend, dtype):
    q, k, cos, sin = tensors(dtype)
    got = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for have, want in zip(got, rotary(q, k, cos, sin), strict=True):
        assert torch.equal(have, want.transpose(1, 2))
    dy = torch.ones_like(got[0])
    leaf = q.transpose(1, 2).detach().requires_grad_()
    y, _ = rotary(leaf, k.transpose(1, 2), cos, sin, unsqueeze_dim=2)  # and k has no gradient
    (dq,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(dq.transpose(1, 2), results_of_ones(q, k, cos, sin))


def results_of_ones(q, k, cos, sin) -> torch.Tensor:
    return with_gradients(lambda q: rotary(q, k, cos, sin)[0], (q,), torch.ones(q.shape))[1]


def test_gradients(backend):
    q, k, cos, sin = tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batches", [1, 2], ids=["one table", "a table each"])
def test_cpu_kernel(backward, batches, number_of_threads):
    from kernels.cpu import rotary as cell

    x = bf16(2, 5, 3, 14).transpose(1, 2)  # [batch, heads, tokens, d], as a model has it
    cos, sin = (bf16(batches, 1, 5, 14, seed=s) for s in (1, 2))
    got, again = (cell.rotary_backward if backward else cell.rotary)(x, x, cos, sin)
    assert torch.equal(got, again)
    assert (got.transpose(1, 2) if backward else got).is_contiguous()
    x1, x2 = x.double().chunk(2, -1)
    (c1, c2), (s1, s2) = cos.double().chunk(2, -1), sin.double().chunk(2, -1)
    pairs = (x1 * c1 + x2 * s2, x2 * c2 - x1 * s1) if backward else (x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)
    error = (got.double() - torch.cat(pairs, -1)).abs()
    assert error.max() <= 3 * HALF_ULP * x.double().abs().max() * 3


def test_opcheck():
    q, k, cos, sin = tensors(torch.float32)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
    torch.library.opcheck(torch.ops.qdora.rotary.default, (*leaves, cos, sin))
    torch.library.opcheck(torch.ops.qdora.rotary_backward.default, (q, k, cos, sin))


def test_compiles(backend):
    q, k, cos, sin = tensors(torch.float32)
    assert_compiles(lambda q, k: rotary(q, k, cos.to(q.device), sin.to(q.device)), q, k)


def test_bad_input():
    q, k, cos, sin = tensors(torch.float32)
    for args in (
        (q[0], k, cos, sin),
        (q, k[..., :8], cos, sin),
        (q, k, cos[:, 1:], sin[:, 1:]),
        (q.half(), k, cos, sin),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            rotary(*args)
    with pytest.raises(ValueError, match="must be alike"):
        rotary(q, k, cos, sin[:1])
