"""The gated MLP's product: definition and CPU kernels against float64, NaN and infinity, odd sizes, bad input."""

import pytest
import torch
from torch.nn import functional as F

from kernels import swiglu
from kernels.cpu import threads
from tests.kernels.op_cases import assert_as_accurate, assert_compiles, assert_rounded, bf16, with_gradients

needs_kernels = pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")


def plain(gate, up):
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_against_float64(backend, dtype):
    torch.manual_seed(0)
    leaves, dy = [torch.randn(7, 33).to(dtype) for _ in range(2)], torch.randn(7, 33).to(dtype)
    got, torchs = with_gradients(swiglu, leaves, dy), with_gradients(plain, leaves, dy)
    if backend == "reference":
        assert torch.equal(got[0], torchs[0])
    assert (got[0] - torchs[0]).abs().max() <= torch.finfo(dtype).eps * torchs[0].abs().max()
    assert_as_accurate(got, torchs, with_gradients(plain, [leaf.double() for leaf in leaves], dy), dtype)


def test_gradients(backend):
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, leaves)


@needs_kernels
@pytest.mark.parametrize("n", [1, 15, 1000])
def test_cpu_kernel(n, number_of_threads):
    from kernels.cpu import swiglu as cell

    gate, up, dy = 4 * bf16(n), bf16(n, seed=1), bf16(n, seed=2)
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    exact = plain(*leaves)
    assert_rounded(cell.swiglu(gate, up), exact.detach(), 2)
    exact.backward(dy.double())
    for got, leaf in zip(cell.swiglu_backward(dy, gate, up), leaves):
        assert_rounded(got, leaf.grad, 2)


@needs_kernels
def test_cpu_kernel_of_what_is_not_a_number(number_of_threads):
    from kernels.cpu import swiglu as cell

    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 0.0, -0.0]).bfloat16()
    ones = torch.ones_like(gate)
    torch.testing.assert_close(cell.swiglu(gate, ones)[[0, 1, 3, 4, 5]], F.silu(gate)[[0, 1, 3, 4, 5]], equal_nan=True)
    assert cell.swiglu_backward(ones, gate, ones)[0][0].isnan()


def test_gaps_in_memory_and_nothing(backend):
    gate, up = bf16(4, 6), bf16(4, 6, seed=1)
    assert torch.equal(swiglu(gate.t(), up.t()), swiglu(gate, up).t())
    assert swiglu(gate[:0], up[:0]).shape == (0, 6)


def test_opcheck():
    gate, up = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.qdora.swiglu.default, (gate, up))
    backward = (torch.randn(3, 5), gate.detach(), up.detach())
    torch.library.opcheck(torch.ops.qdora.swiglu_backward.default, backward)


def test_compiles(backend):
    assert_compiles(swiglu, torch.randn(2, 5), torch.randn(2, 5))


def test_bad_input():
    with pytest.raises(ValueError, match="must be floats of one shape"):
        swiglu(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="must be floats of one shape"):
        swiglu(torch.zeros(2), torch.zeros(2).double())
