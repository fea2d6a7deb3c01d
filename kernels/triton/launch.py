"""The one place where Triton kernels are launched, and the sizes that a launcher computes on the host.

`launch` runs a kernel on the device of its tensors. Inside `recording()` nothing runs: each launch is written down with
all it would have passed. So `python -m kernels.aot` compiles what launchers really pass, from a call on meta tensors.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 512  # rows alone make too few programs for a GPU: K is split until there are about this many,
MAX_SPLITS = 16  # but a program loads its tile of the rows' operand once and must not do so for too few columns
_recorded: list["Launch"] | None = None


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs along each axis.
        arguments: value of each parameter of the kernel, by name; tensors may be on the meta device.
        options: num_warps, num_stages and enable_fp_fusion, as far as the launcher sets them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches are appended to the list and do not run."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel, grid: tuple[int, ...], *args, fp_fusion: bool, **more) -> None:
    """Launch `kernel` on `grid`, or nothing if the grid is empty.

    Args:
        args: the kernel's arguments, of which at least one is a tensor.
        fp_fusion: a product and a sum may become one fused multiply-add. Triton's own default is about to change.
        more: the kernel's other arguments by name, num_warps and num_stages.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        names = dict.fromkeys(kernel.arg_names)
        options = {name: more.pop(name) for name in list(more) if name not in names}
        arguments = dict(zip(kernel.arg_names, args)) | more
        _recorded.append(Launch(kernel, grid, arguments, options | {"enable_fp_fusion": fp_fusion}))
        return
    if _one_device():  # or choosing the device would take as long as some of the kernels
        kernel[grid](*args, **more, enable_fp_fusion=fp_fusion)
        return
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*args, **more, enable_fp_fusion=fp_fusion)


@functools.cache
def _one_device() -> bool:
    """True if all tensors of a launch can only be on the current device."""
    return torch.cuda.device_count() < 2


# `triton.cdiv` and `next_power_of_2` can also be called in kernels. That makes them slow on the host: microseconds, a
# few times a launch. So we have our own.


def cdiv(n: int, size: int) -> int:
    """⌈n / size⌉: how many blocks of `size` hold n."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than n ≥ 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H100's 132 for tensors that are on none, which are compiled for or interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def split_columns(columns: int, block: int, programs: int) -> tuple[int, int]:
    """(columns of one split, splits) of a loop over `columns` in steps of `block`, for `programs` blocks of rows."""
    splits = min(MAX_SPLITS, max(1, PROGRAMS // programs))
    of_one = cdiv(cdiv(columns, splits), block) * block
    return of_one, cdiv(columns, of_one)
