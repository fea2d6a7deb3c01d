"""The tests of ops without weights share gradients, the accuracy rule, rounding to bf16 and torch.compile."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import use_backend

HALF_ULP = 2.0**-8  # of bf16, relative: what one rounding may add


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def with_gradients(function: Callable, leaves: Sequence[Tensor], *dys: Tensor) -> list[Tensor]:
    """The results of `function` of the leaves, and the gradients of the leaves for the results' gradients `dys`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    given = [dy.to(y.dtype) for y, dy in zip(results, dys, strict=True)]
    return [y.detach() for y in results] + list(torch.autograd.grad(results, leaves, given))


def assert_as_accurate(got: list[Tensor], torchs: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """error(got) ≤ 2 · error(torch at that dtype) + four units in the last place, each the largest one."""
    for have, theirs, want in zip(got, torchs, exact, strict=True):
        allowed = 2 * (theirs.double() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (have.double() - want).abs().max() <= allowed


def assert_rounded(got: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """Within so many roundings to bf16 of float64, of each value or of the largest ones that were subtracted."""
    assert got.dtype == torch.bfloat16 and got.shape == exact.shape
    error = (got.double() - exact).abs()
    assert (error <= roundings * HALF_ULP * exact.abs() + 1e-3 * HALF_ULP * exact.abs().max()).all(), error.max()


def assert_compiles(function: Callable, *leaves: Tensor) -> None:
    """The same from torch.compile, without a break in the graph, as from eager PyTorch; shapes on the meta device."""
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = function(*leaves)
    dys = [torch.randn_like(y) for y in ([results] if isinstance(results, Tensor) else results)]
    for got, want in zip(with_gradients(compiled, leaves, *dys), with_gradients(function, leaves, *dys), strict=True):
        torch.testing.assert_close(got, want)
    with use_backend("reference"):
        on_meta = with_gradients(function, [x.to("meta") for x in leaves], *(dy.to("meta") for dy in dys))
    for got, want in zip(on_meta, with_gradients(function, leaves, *dys), strict=True):
        assert (got.is_meta, got.shape, got.dtype) == (True, want.shape, want.dtype)
