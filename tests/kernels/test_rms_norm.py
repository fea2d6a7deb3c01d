"""RMSNorm: definition and CPU kernels against float64, bits of transformers' norm, odd sizes, bad input."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels import add_rms_norm, rms_norm
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


def summed(norm):
    """(norm(x + residual), x + residual), the norm with a frozen or a trained weight."""

    def both(x, residual, weight):
        h = x + residual
        return norm(h, weight), h

    return both


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_of_a_sum_against_float64(backend, dtype, used, trains):
    torch.manual_seed(0)
    x, residual, dy, dh = (torch.randn(2, 5, 33).to(dtype) for _ in range(4))
    weight = torch.randn(33).to(dtype)
    leaves = [x, residual, weight] if trains and used != "sum" else [x, residual]
    dys = {"both": (dy, dh), "norm": (dy,), "sum": (dh,)}[used]

    def computed(op, leaves):
        def results(*leaves):
            y, h = op(*leaves) if len(leaves) == 3 else op(*leaves, weight.to(leaves[0].dtype))
            return {"both": (y, h), "norm": y, "sum": h}[used]

        return with_gradients(results, leaves, *dys)

    got = computed(lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS), leaves)
    torchs = computed(summed(theirs), leaves)
    want = computed(summed(exact), [leaf.double() for leaf in leaves])
    if used != "norm":
        assert torch.equal(got[len(dys) - 1], torchs[len(dys) - 1])  # the sum
    assert_as_accurate(got, torchs, want, dtype)


@pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")
def test_cpu_kernel_of_a_sum_is_the_norms(number_of_threads):
    from kernels.cpu import rms_norm as cell

    x, residual, dy, dh = (bf16(5, 576, seed=i) for i in range(4))
    weight = bf16(576, seed=4)
    y, h, r = cell.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(h, x + residual)
    for got, want in zip((y, r), cell.rms_norm(h, weight, 1e-5)):
        assert torch.equal(got, want)
    dx, _ = cell.add_rms_norm_backward(dy, dh, h, weight, r, False)
    own, _ = cell.rms_norm_backward(dy, h, weight, r, False)
    assert (dx.double() - own.double() - dh.double()).abs().max() <= HALF_ULP * 2 * dx.abs().max()


def test_a_sum_of_what_differs_is_refused():
    with pytest.raises(ValueError, match=r"residual \(2, 7\) torch.float32 does not fit x \(2, 6\) torch.float32"):
        add_rms_norm(torch.zeros(2, 6), torch.zeros(2, 7), torch.zeros(6), EPS)


def test_a_sum_compiles_and_passes_torchs_checks(backend):
    x, residual, weight = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.rand(6)
    assert_compiles(lambda x, residual, w: add_rms_norm(x, residual, w, EPS), x, residual, weight)
    leaves = x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.qdora.add_rms_norm.default, (*leaves, EPS))


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
