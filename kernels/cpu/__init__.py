"""Kernels for CPUs: what PyTorch would do in several passes over memory, in one, in bf16.

PyTorch's own operations compute a product of matrices as fast as a CPU can, but everything between two products is a
call for each +, ×, cast and sum. Here one call does what lies between. The functions are written in Python and compiled
by numba (code.py), and run on PyTorch's threads (threads.py). They take dense tensors and check nothing: ask `takes`
first. In other dtypes, and where PyTorch does not bring libgomp, PyTorch's operations do the same work.
"""

import functools
import importlib

import torch
from torch import Tensor

from kernels.cpu import threads


@functools.cache
def available() -> bool:
    """True once the kernels are imported, which compiles them or reads what was compiled before: here, because that
    takes a second that other processes need not spend."""
    if not threads.available():
        return False
    for name in ("elementwise", "norms", "packing", "softmax"):
        importlib.import_module(f"kernels.cpu.{name}")
    return True


def takes(*tensors: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """True if the kernels can have these: `dtype` on a CPU, without gaps in memory."""
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return False
    return available()
