"""The column of kernels for CPUs: PyTorch's several passes over memory in one.

PyTorch multiplies matrices as fast as a CPU can. Between two products it makes one call for each +, ×, cast and sum.
Here one call does all of that, in bf16. The functions are written in Python, compiled by numba (numba_tools.py) and run
on PyTorch's threads (threads.py). In other dtypes PyTorch's operations do the same work.

Files and functions have the names of the ops that they compute. `supports_if` says for which tensors they do so.
"""

import torch
from torch import Tensor

from kernels.cpu import threads


def available() -> bool:
    """True if the kernels can run in this process."""
    return threads.available()


def supports(*tensors: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """True if the kernels can read these: `dtype` on a CPU, or on meta, where they do nothing; no gaps in memory."""
    for tensor in tensors:  # a generator takes longer than the checks
        if tensor.dtype != dtype or not (tensor.is_cpu or tensor.is_meta) or not tensor.is_contiguous():
            return False
    return True
