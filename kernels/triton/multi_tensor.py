"""One launch for many tensors: a table of their addresses, and the tensor that each program works on.

    table   int64 [arguments + 2, tensors]: a tensor's address in every argument, its elements, its first program
    owner   int32 [programs]: the tensor of each program

A program handles one tile of one tensor, so tensors of any sizes share a launch and no program is idle.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes; a 128-bit load or store needs them


@triton.jit
def tensor_of_program(table_ptr, owner_ptr, tensors, ARGUMENTS: tl.constexpr):
    """(tensor, its elements, this program's tile of it)"""
    tensor = tl.load(owner_ptr + tl.program_id(0))
    n = tl.load(table_ptr + ARGUMENTS * tensors + tensor)
    return tensor, n, tl.program_id(0).to(tl.int64) - tl.load(table_ptr + (ARGUMENTS + 1) * tensors + tensor)


@triton.jit
def pointer(table_ptr, tensors, tensor, ARGUMENT: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where `tensor` of argument ARGUMENT begins."""
    first = tl.load(table_ptr + ARGUMENT * tensors + tensor).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(first, 16) if ALIGNED else first


@lru_cache(maxsize=1024)
def _owners(sizes: tuple[int, ...], tile: int, device: torch.device) -> tuple[list[int], Tensor]:
    """(the first program of each tensor, and of one more; owner)"""
    programs = [-(-n // tile) for n in sizes]
    first = [0]
    for count in programs:
        first.append(first[-1] + count)
    owner = torch.arange(len(sizes), dtype=torch.int32, device="cpu").repeat_interleave(
        torch.tensor(programs, device="cpu")
    )
    return first, owner.to(device)


def plan(arguments: Sequence[Sequence[Tensor]], tile: int) -> tuple[Tensor, Tensor, int, bool]:
    """The table and the programs of one launch.

    Args:
        arguments: the tensors of each argument, contiguous, on one device. Those of the first decide the programs.
        tile: elements of the first argument a program handles.

    Returns:
        table, owner, the number of programs, and whether every address is a multiple of 16 bytes.
    """
    addresses = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in arguments)
    return _plan(addresses, tuple(tensor.numel() for tensor in arguments[0]), tile, arguments[0][0].device)


@lru_cache(maxsize=64)  # a step works on the tensors of the last one, and a graph's capture must not copy from the host
def _plan(
    addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], tile: int, device: torch.device
) -> tuple[Tensor, Tensor, int, bool]:
    first, owner = _owners(sizes, tile, device)
    table = torch.tensor([*addresses, sizes, first[:-1]], dtype=torch.int64, device="cpu").to(device)
    return table, owner, first[-1], not any(a % ALIGNMENT for row in addresses for a in row)
