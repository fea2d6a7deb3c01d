"""Checks of results: the same bytes, or as accurate as torch. A wrong result raises AssertionError with the reason."""

from collections.abc import Callable

import torch

from kernels import use_backend
from kernels.bench.spec import Inputs, Result


def same_bytes(expected: Result) -> Callable[[Result], None]:
    """Every output equals that of `expected`, byte for byte; only its shape may differ."""

    def check(got: Result) -> None:
        assert got.keys() == expected.keys(), f"gives {', '.join(got)} instead of {', '.join(expected)}"
        for name, want in expected.items():
            have = got[name]
            assert have.dtype == want.dtype and have.numel() == want.numel(), (
                f"{name}: {have.numel()} values of {have.dtype} instead of {want.numel()} of {want.dtype}"
            )
            wrong = have.reshape(-1).view(torch.uint8) != want.reshape(-1).view(torch.uint8)
            assert not wrong.any(), f"{name}: {wrong.sum().item():,} of {wrong.numel():,} bytes differ"

    return check


def as_the_reference(op: Callable[[Inputs], Callable[[], Result]]) -> Callable[[Inputs], Callable[[Result], None]]:
    """The same bytes as `op` on the reference."""

    def check(inputs: Inputs) -> Callable[[Result], None]:
        with use_backend("reference"):
            return same_bytes(op(inputs)())

    return check


def as_accurate(exact: Result, by_torch: Result, dtype: torch.dtype) -> Callable[[Result], None]:
    """error ≤ 2 · error(torch) + 4 units in the last place of `dtype`, each the largest one against float64.

    Args:
        exact: computed in float64.
        by_torch: computed by plain torch in `dtype`.
    """

    def error(name: str, result: Result) -> float:
        return (result[name].double() - exact[name]).abs().max().item()

    ulps = 4 * torch.finfo(dtype).eps
    allowed = {name: 2 * error(name, by_torch) + ulps * want.abs().max().item() for name, want in exact.items()}

    def check(got: Result) -> None:
        assert got.keys() == exact.keys(), f"gives {', '.join(got)} instead of {', '.join(exact)}"
        for name in exact:
            found = error(name, got)
            assert found <= allowed[name], f"{name}: error {found:.2e}, allowed {allowed[name]:.2e}"

    return check
