"""The CPU kernels against float64, and beside what PyTorch's operations make of the same: odd sizes, NaN, threads."""

import pytest
import torch
from torch import Tensor

from kernels import cpu
from kernels.cpu import threads

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
    assert cpu.takes(x)
    return x


def assert_rounded(got: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """Within so many roundings to bf16 of float64, of each value or of the largest ones that were subtracted."""
    assert got.dtype == torch.bfloat16 and got.shape == exact.shape
    error = (got.double() - exact).abs()
    assert (error <= roundings * HALF_ULP * exact.abs() + 1e-3 * HALF_ULP * exact.abs().max()).all(), error.max()


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 64), (2, 7, 576)], ids=str)
def test_rms_norm(shape):
    x, weight, dy = bf16(*shape), bf16(shape[-1], seed=1), bf16(*shape, seed=2)
    y, scale = cpu.norms.rms_norm(x, weight, 1e-5)
    wide = x.double().requires_grad_()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(
        scale.double(), (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt(), rtol=1e-6, atol=0
    )
    assert_rounded(y, exact.detach(), 2)
    exact.backward(dy.double())
    got = cpu.norms.rms_norm_backward(dy, x, weight, scale)
    error = (got.double() - wide.grad).abs()
    assert error.max() <= 3 * HALF_ULP * (dy.double() * weight.double()).abs().mul(scale).max()


@pytest.mark.parametrize("rows", [1, 3, 130])
def test_scale_columns(rows):
    dy, y, gain = bf16(rows, 77), bf16(rows, 77, seed=1), torch.rand(77)
    dz, total = cpu.norms.scale_columns(dy, y, gain)
    assert_rounded(dz, dy.double() * gain.double())
    torch.testing.assert_close(total.double(), (dy.double() * y.double()).sum(0), rtol=1e-6, atol=1e-5)
    assert torch.equal(cpu.norms.scale_columns_(dy, gain), dz)


@pytest.mark.parametrize("rank", [1, 16, 33])
def test_dora_norm(rank):
    u, b, v, norm_sq = bf16(50, rank), torch.randn(50, rank), torch.randn(50, rank), 100 + torch.rand(50)
    u[::7], b[::7], v[::7] = -50, 1, 0  # takes away more than is there
    exact = norm_sq.double() + (b.double() * (2 * u.double() + v.double())).sum(1)
    magnitude = torch.rand(50)
    norm, gain, cancelled = cpu.norms.dora_norm(u, b, v / 4, norm_sq, magnitude, 2.0, 0.9)
    assert cancelled and not cpu.norms.dora_norm(0 * u, b, 0 * v, norm_sq, magnitude, 2.0, 0.9)[2]
    below = exact < 0.9 * norm_sq.double()
    assert torch.equal(norm < 0, below) and below.any() and not below.all()
    torch.testing.assert_close(norm[~below].double(), exact[~below].sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gain[~below], magnitude[~below] / norm[~below], rtol=1e-6, atol=0)
    assert cpu.norms.has_below(norm_sq - 101, 0.9) and not cpu.norms.has_below(-norm_sq, 99.0)
    zero = torch.zeros(50)
    assert torch.equal(cpu.norms.dora_norm(0 * u, b, 0 * v, zero, magnitude, 2.0, 0.9)[1], zero)


@pytest.mark.parametrize("sizes", [(1, 1), (40, 3), (576, 999)], ids=str)
def test_factors(sizes):
    x, y = (torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in sizes)
    narrow = cpu.elementwise.narrowed(x, y, 1.5, 1.0)
    assert torch.equal(narrow[0], (x * 1.5).bfloat16()) and torch.equal(narrow[1], y.bfloat16())
    widened = cpu.elementwise.widened(*narrow, 0.3)
    assert torch.equal(widened[0], narrow[0].float() * 0.3) and torch.equal(widened[1], narrow[1].float())
    into = bf16(2, sizes[0])
    assert cpu.elementwise.narrowed(x, y, 1.5, 1.0, into[1])[0].data_ptr() == into[1].data_ptr()
    assert torch.equal(into[1], narrow[0])


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (17, 576)], ids=str)
def test_gram(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cpu.norms.gram(x).double(), x.double() @ x.double().t(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("n", [1, 15, 1000])
def test_swiglu(n):
    gate, up, dy = 4 * bf16(n), bf16(n, seed=1), bf16(n, seed=2)
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    exact = torch.nn.functional.silu(leaves[0]) * leaves[1]
    assert_rounded(cpu.elementwise.swiglu(gate, up), exact.detach(), 2)
    exact.backward(dy.double())
    for got, leaf in zip(cpu.elementwise.swiglu_backward(dy, gate, up), leaves):
        assert_rounded(got, leaf.grad, 2)


def test_swiglu_of_what_is_no_number():
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 0.0, -0.0]).bfloat16()
    ones = torch.ones_like(gate)
    torch.testing.assert_close(
        cpu.elementwise.swiglu(gate, ones)[[0, 1, 3, 4, 5]],
        torch.nn.functional.silu(gate)[[0, 1, 3, 4, 5]],
        equal_nan=True,
    )
    assert cpu.elementwise.swiglu_backward(ones, gate, ones)[0][0].isnan()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batches", [1, 2], ids=["one table", "a table each"])
def test_rotate(backward, batches):
    x = bf16(2, 5, 3, 14).transpose(1, 2)  # [batch, heads, tokens, d], as a model has it
    cos, sin = (bf16(batches, 1, 5, 14, seed=s) for s in (1, 2))
    got = cpu.elementwise.rotate(x, cos, sin, backward)
    assert (got.transpose(1, 2) if backward else got).is_contiguous()
    x1, x2 = x.double().chunk(2, -1)
    (c1, c2), (s1, s2) = cos.double().chunk(2, -1), sin.double().chunk(2, -1)
    pairs = (x1 * c1 + x2 * s2, x2 * c2 - x1 * s1) if backward else (x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)
    error = (got.double() - torch.cat(pairs, -1)).abs()
    assert error.max() <= 3 * HALF_ULP * x.double().abs().max() * 3


@pytest.mark.parametrize("start", [0, 4])
def test_attention(start):
    heads, queries, keys = 3, 4, 4 + start
    scores = torch.randn(2, heads * queries, keys, generator=torch.Generator().manual_seed(0)) * 5
    dp = torch.randn(2, heads * queries, keys, generator=torch.Generator().manual_seed(1))
    leaf = scores.double().requires_grad_()
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(start + 1).repeat(heads, 1)
    exact = leaf.masked_fill(hidden, -torch.inf).softmax(-1)
    exact.backward(dp.double())
    assert_rounded(cpu.softmax.probabilities(scores.clone(), queries, start), exact.detach())
    p, ds = cpu.softmax.scores_backward(scores.clone(), dp, queries, start, 0.5)
    assert_rounded(p, exact.detach())
    assert (2 * ds.double() - leaf.grad).abs().max() <= 2 * HALF_ULP * leaf.grad.abs().max()
    scores[0, 5, 0] = torch.nan
    assert cpu.softmax.probabilities(scores.clone(), queries, start)[0, 5, 0].isnan()


@pytest.mark.parametrize("start", [0, 2])
def test_attention_with_a_mask(start):
    batch, groups, heads, queries, keys = 3, 2, 3, 4, 70
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch, 1, queries + start, keys + 5, generator=generator) < 0.7
    mask[1, 0, start + 2] = False  # sees nothing: every key as much
    scores, dp = (torch.randn(batch * groups, heads * queries, keys, generator=generator) * 3 for _ in range(2))
    leaf = scores.double().requires_grad_()
    seen = mask[:, :, start:, :keys].repeat_interleave(groups, 0).repeat(1, 1, heads, 1).squeeze(1)
    exact = leaf.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
    exact.backward(dp.double())
    assert_rounded(cpu.softmax.probabilities(scores, queries, start, mask), exact.detach())
    p, ds = cpu.softmax.scores_backward(scores, dp, queries, start, 1.0, mask)
    assert_rounded(p, exact.detach())
    blind = ~seen.any(-1)
    assert (ds.double() - leaf.grad)[~blind].abs().max() <= 2 * HALF_ULP * leaf.grad.abs().max()


@pytest.mark.parametrize("classes", [2, 1001])
def test_cross_entropy(classes):
    logits, targets = 5 * bf16(7, classes), torch.arange(7) % classes
    leaf = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    exact.sum().backward()
    gradient = logits.clone()
    loss = cpu.softmax.cross_entropy(gradient, targets)
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    assert_rounded(gradient, leaf.grad)
    logits[3, 0] = torch.nan
    assert cpu.softmax.cross_entropy(logits, targets)[3].isnan()
    for target in (-1, classes):
        with pytest.raises(IndexError, match="a target is not in"):
            cpu.softmax.cross_entropy(logits, torch.full((7,), target))


def test_the_exponential_is_as_exact_as_it_says():
    """Through the loss of two classes, log(1 + e^x) + …: of logits (0, x) the gradient's second part is a sigmoid."""
    x = torch.linspace(-80, 0, 4001).bfloat16()
    logits = torch.stack([torch.zeros_like(x), x], 1)
    cpu.softmax.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
    error = (logits[:, 1].double() / torch.sigmoid(x.double()) - 1).abs().max().item()
    assert error <= HALF_ULP * (1 + 1e-3)  # and so is a number


def test_what_is_not_taken():
    x = bf16(4, 6)
    assert not cpu.takes(x.float()) and not cpu.takes(x.half()) and not cpu.takes(x.t()) and not cpu.takes(x, x[:, 1:])
    assert not cpu.takes(torch.empty(2, dtype=torch.bfloat16, device="meta"))


def test_where_pytorch_brings_no_libgomp(monkeypatch):
    monkeypatch.setattr(threads, "available", lambda: False)
    cpu.available.cache_clear()
    try:
        assert not cpu.takes(torch.zeros(4, dtype=torch.bfloat16))
    finally:
        monkeypatch.undo()
        cpu.available.cache_clear()
