"""RMSNorm: definition and CPU kernels against float64, bits of transformers' norm, odd sizes, bad input."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels import rms_norm
from kernels.cpu import threads
from tests.kernels.op_cases import (
    HALF_ULP,
    assert_as_accurate,
    assert_compiles,
    assert_rounded,
    bf16,
    with_gradients,
)

EPS = 1e-3


def exact(x, weight):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def theirs(x, weight=None):
    norm = LlamaRMSNorm(33, eps=EPS)
    del norm.weight
    norm.weight = weight
    return norm(x)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(backend, dtype, trains):
    torch.manual_seed(0)
    leaves, dy = [torch.randn(2, 5, 33).to(dtype), torch.randn(33).to(dtype)], torch.randn(2, 5, 33).to(dtype)
    fixed = () if trains else (leaves.pop(),)
    got = with_gradients(lambda *leaves: rms_norm(*leaves, *fixed, EPS), leaves, dy)
    torchs = with_gradients(lambda *leaves: theirs(*leaves, *fixed), leaves, dy)
    want = with_gradients(
        lambda *leaves: exact(*leaves, *(w.double() for w in fixed)), [leaf.double() for leaf in leaves], dy
    )
    if dtype == torch.float32 or backend == "reference":
        assert torch.equal(got[0], torchs[0])
    assert (got[0] - torchs[0]).abs().max() <= torch.finfo(dtype).eps * torchs[0].abs().max()
    assert_as_accurate(got, torchs, want, dtype)


def test_gradients(backend):
    x, weight = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x, w, EPS), (x.requires_grad_(), weight.requires_grad_()), eps=1e-6
    )


@pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 64), (2, 7, 576)], ids=str)
def test_cpu_kernel(shape, number_of_threads):
    from kernels.cpu import rms_norm as cell

    x, weight, dy = bf16(*shape), bf16(shape[-1], seed=1), bf16(*shape, seed=2)
    y, scale = cell.rms_norm(x, weight, 1e-5)
    wide = x.double().requires_grad_()
    want = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(
        scale.double(), (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt(), rtol=1e-6, atol=0
    )
    assert_rounded(y, want.detach(), 2)
    want.backward(dy.double())
    got, _ = cell.rms_norm_backward(dy, x, weight, scale, False)
    error = (got.double() - wide.grad).abs()
    assert error.max() <= 3 * HALF_ULP * (dy.double() * weight.double()).abs().mul(scale).max()


def test_a_weight_of_another_dtype_and_gaps_in_memory(backend):
    x, weight = bf16(4, 6, seed=1), torch.rand(6)
    assert torch.equal(rms_norm(x, weight, EPS), weight * rms_norm(x, torch.ones(6), EPS))
    assert torch.equal(rms_norm(x.t().contiguous().t(), weight, EPS), rms_norm(x, weight, EPS))
    assert rms_norm(x[:0], weight, EPS).shape == (0, 6)


def test_opcheck():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.qdora.rms_norm.default, (x, weight, EPS))
    r = torch.rand(2, 3, 1)
    for needs_dweight in (False, True):
        args = (torch.randn(2, 3, 8), x.detach(), weight.detach(), r, needs_dweight)
        torch.library.opcheck(torch.ops.qdora.rms_norm_backward.default, args)


def test_compiles(backend):
    assert_compiles(lambda x, w: rms_norm(x, w, EPS), torch.randn(2, 5, 12), torch.randn(12))


def test_bad_input():
    with pytest.raises(ValueError, match=r"weight \(4,\) does not fit x \(2, 3\)"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), EPS)
    with pytest.raises(ValueError, match="both must be floats"):
        rms_norm(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3), EPS)
