"""The parts of an adapter's CPU kernels against float64, and beside PyTorch's operations: odd sizes, NaN, threads."""

import pytest
import torch
from torch import Tensor

from kernels import cpu
from kernels.columns import find_function
from kernels.cpu import dora, lora, threads

pytestmark = pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")

HALF_ULP = 2.0**-8  # of bf16, relative: what one rounding may add


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def number_of_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def bf16(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert cpu.supports(x)
    return x


def assert_rounded(got: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """Within so many roundings to bf16 of float64, of each value or of the largest ones that were subtracted."""
    assert got.dtype == torch.bfloat16 and got.shape == exact.shape
    error = (got.double() - exact).abs()
    assert (error <= roundings * HALF_ULP * exact.abs() + 1e-3 * HALF_ULP * exact.abs().max()).all(), error.max()


@pytest.mark.parametrize("rows", [1, 3, 130])
def test_scale_columns(rows):
    dy, y, gain = bf16(rows, 77), bf16(rows, 77, seed=1), torch.rand(77)
    dz, total = dora.scale_columns(dy, y, gain)
    assert_rounded(dz, dy.double() * gain.double())
    torch.testing.assert_close(total.double(), (dy.double() * y.double()).sum(0), rtol=1e-6, atol=1e-5)
    assert torch.equal(dora.scale_columns_(dy, gain), dz)


@pytest.mark.parametrize("rank", [1, 16, 33])
def test_dora_norm(rank):
    u, b, v, norm_sq = bf16(50, rank), torch.randn(50, rank), torch.randn(50, rank), 100 + torch.rand(50)
    u[::7], b[::7], v[::7] = -50, 1, 0  # takes away more than is there
    exact = norm_sq.double() + (b.double() * (2 * u.double() + v.double())).sum(1)
    magnitude = torch.rand(50)
    norm, gain, cancelled = dora.factored_norm(u, b, v / 4, norm_sq, magnitude, 2.0, 0.9)
    assert cancelled and not dora.factored_norm(0 * u, b, 0 * v, norm_sq, magnitude, 2.0, 0.9)[2]
    below = exact < 0.9 * norm_sq.double()
    assert torch.equal(norm < 0, below) and below.any() and not below.all()
    torch.testing.assert_close(norm[~below].double(), exact[~below].sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gain[~below], magnitude[~below] / norm[~below], rtol=1e-6, atol=0)
    assert dora.has_below(norm_sq - 101, 0.9) and not dora.has_below(-norm_sq, 99.0)
    zero = torch.zeros(50)
    assert torch.equal(dora.factored_norm(0 * u, b, 0 * v, zero, magnitude, 2.0, 0.9)[1], zero)


@pytest.mark.parametrize("sizes", [(1, 1), (40, 3), (576, 999)], ids=str)
def test_factors(sizes):
    x, y = (torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in sizes)
    narrow = lora.narrowed(x, y, 1.5, 1.0)
    assert torch.equal(narrow[0], (x * 1.5).bfloat16()) and torch.equal(narrow[1], y.bfloat16())
    widened = lora.widened(*narrow, 0.3)
    assert torch.equal(widened[0], narrow[0].float() * 0.3) and torch.equal(widened[1], narrow[1].float())
    into = bf16(2, sizes[0])
    assert lora.narrowed(x, y, 1.5, 1.0, into[1])[0].data_ptr() == into[1].data_ptr()
    assert torch.equal(into[1], narrow[0])


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (17, 576)], ids=str)
def test_gram(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dora.gram(x).double(), x.double() @ x.double().t(), rtol=1e-6, atol=1e-4)


def test_what_is_not_supported():
    x = bf16(4, 6)
    assert not cpu.supports(x.float()) and not cpu.supports(x.half())
    assert not cpu.supports(x.t()) and not cpu.supports(x, x[:, 1:])


def test_where_pytorch_brings_no_libgomp(monkeypatch):
    monkeypatch.setattr(threads, "available", lambda: False)
    assert not cpu.available()
    assert find_function("cpu", "lora", "lora_linear") is None
