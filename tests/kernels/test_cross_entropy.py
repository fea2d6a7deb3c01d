"""The loss without logits: definition and CPU kernels against torch's in float64, chunks, targets, bad input."""

import pytest
import torch
from torch.nn import functional as F

from kernels import cross_entropy as op_file
from kernels import linear_cross_entropy
from kernels.cpu import threads
from tests.kernels.op_cases import HALF_ULP, assert_compiles, assert_rounded, bf16

needs_kernels = pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")


def with_gradients(function, *leaves: torch.Tensor) -> list[torch.Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss * 0.25, leaves)]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("n", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_against_float64(backend, dtype, n, bias, monkeypatch):
    monkeypatch.setattr(op_file, "CHUNK_BYTES", 4 * 101 * 3)  # three tokens a chunk: 7 leave a tail
    torch.manual_seed(0)
    shapes = [(n, 16), (101, 16)] + ([(101,)] if bias else [])
    leaves = [torch.randn(shape).to(dtype) for shape in shapes]
    targets = torch.randint(101, (n,))
    got = with_gradients(lambda h, w, b=None: linear_cross_entropy(h, w, b, targets), *leaves)

    def plain(h, w, b=None):
        return F.cross_entropy(
            F.linear(h, w, b).to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="sum"
        )

    exact = with_gradients(plain, *(leaf.double() for leaf in leaves))
    by_torch = with_gradients(plain, *leaves)
    for have, want, torchs in zip(got, exact, by_torch):
        assert have.dtype == torchs.dtype
        allowed = 2 * (torchs.double() - want).abs().max() + 8 * torch.finfo(dtype).eps * want.abs().max() if n else 0.0
        if have.numel():
            assert (have.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("pattern", ["some", "all", "a-chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ignored_targets(backend, dtype, pattern, monkeypatch):
    """They add nothing at all, not even where logits are not finite; the others' bits stay."""
    monkeypatch.setattr(op_file, "CHUNK_BYTES", torch.empty(0, dtype=dtype).element_size() * 101 * 3)
    torch.manual_seed(0)
    h, w, b = (torch.randn(shape).to(dtype) for shape in ((9, 16), (101, 16), (101,)))
    targets = torch.randint(101, (9,))
    ignored = {"some": [1, 2, 8], "all": list(range(9)), "a-chunk": [3, 4, 5]}[pattern]
    others = [i for i in range(9) if i not in ignored]
    left_out = targets.clone()
    left_out[ignored] = -100

    def op(h, w, b):
        return linear_cross_entropy(h, w, b, left_out)

    def plain(h, w, b):
        logits = F.linear(h, w, b).to(torch.promote_types(h.dtype, torch.float32))
        return F.cross_entropy(logits, left_out, ignore_index=-100, reduction="sum")

    got, by_torch = with_gradients(op, h, w, b), with_gradients(plain, h, w, b)
    exact = with_gradients(plain, h.double(), w.double(), b.double())
    for have, want, torchs in zip(got, exact, by_torch):
        allowed = 2 * (torchs.double() - want).abs().max() + 8 * torch.finfo(dtype).eps * want.abs().max()
        assert (have.double() - want).abs().max() <= allowed
    labelled = with_gradients(lambda h: linear_cross_entropy(h, w, b, targets), h)[1]
    assert torch.equal(got[1][others], labelled[others]) and not got[1][ignored].any()
    h[ignored] = torch.inf
    with_inf = with_gradients(lambda h: linear_cross_entropy(h, w, b, left_out), h)
    assert torch.equal(with_inf[0], got[0]) and torch.equal(with_inf[1], got[1])


def test_large_logits_stay_finite(backend):
    h, w = torch.full((1, 16), 50.0), torch.linspace(-1, 1, 101 * 16).view(101, 16)
    got = with_gradients(lambda h: linear_cross_entropy(h, w, None, torch.tensor([0])), h)
    exact = F.cross_entropy(h.double() @ w.double().t(), torch.tensor([0]), reduction="sum")
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-6, atol=0)
    assert got[1].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("classes", [2, 1001])
def test_cpu_kernel(classes, number_of_threads):
    from kernels.cpu.cross_entropy import cross_entropy

    logits, targets = 5 * bf16(7, classes), torch.arange(7) % classes
    leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(leaf, targets, reduction="none")
    exact.sum().backward()
    gradient = logits.clone()
    loss = cross_entropy(gradient, targets)
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    assert_rounded(gradient, leaf.grad)
    logits[3, 0] = torch.nan
    assert cross_entropy(logits, targets)[3].isnan()
    for target in (-1, classes):
        with pytest.raises(IndexError, match="a target is not in"):
            cross_entropy(logits, torch.full((7,), target))


@needs_kernels
def test_the_exponential_is_as_exact_as_it_says(number_of_threads):
    """Through the loss of two classes, log(1 + e^x) + …: of logits (0, x) the gradient's second part is a sigmoid."""
    from kernels.cpu.cross_entropy import cross_entropy

    x = torch.linspace(-80, 0, 4001).bfloat16()
    logits = torch.stack([torch.zeros_like(x), x], 1)
    cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
    error = (logits[:, 1].double() / torch.sigmoid(x.double()) - 1).abs().max().item()
    assert error <= HALF_ULP * (1 + 1e-3)  # and so is a number


def test_without_gradients_none_are_made(backend):
    h, w = torch.randn(3, 4), torch.randn(5, 4)
    loss, *gradients = torch.ops.qdora.linear_cross_entropy(h, w, None, torch.arange(3), False, False, False)
    assert [g.numel() for g in gradients] == [0, 0, 0]
    assert torch.equal(loss, linear_cross_entropy(h, w, None, torch.arange(3)))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_opcheck(bias):
    h, w, b = (torch.randn(shape, requires_grad=True) for shape in ((3, 4), (5, 4), (5,)))
    args = (h, w, b if bias else None, torch.arange(3), True, True, bias)
    torch.library.opcheck(torch.ops.qdora.linear_cross_entropy.default, args)


def test_compiles(backend):
    targets = torch.arange(3)
    assert_compiles(
        lambda h, w: linear_cross_entropy(h, w, None, targets.to(h.device)), torch.randn(3, 4), torch.randn(5, 4)
    )


def test_bad_input():
    h, w, targets = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be \\[n, hidden\\]"):
        linear_cross_entropy(h, w.t(), None, targets)
    with pytest.raises(ValueError, match="must be int64 \\[3\\]"):
        linear_cross_entropy(h, w, None, targets.int())
    with pytest.raises(ValueError, match="bias \\(4,\\) must be \\[5\\]"):
        linear_cross_entropy(h, w, torch.zeros(4), targets)
