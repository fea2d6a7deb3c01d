"""The column of kernels for CPUs: PyTorch's several passes over memory in one.

PyTorch's own operations compute a product of matrices as fast as a CPU can, but everything between two products is a
call for each +, ×, cast and sum. Here one call does what lies between, in bf16, the dtype to train in. The functions
are written in Python, compiled by numba (code.py) and run on PyTorch's threads (threads.py). In other dtypes PyTorch's
operations do the same work.

Files and functions have the names of the ops that they compute. `supports_if` says for which tensors they do so.
"""

import torch
from torch import Tensor

from kernels.cpu import threads


def available() -> bool:
    """True if the kernels can run in this process."""
    return threads.available()


def supports(*tensors: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """True if the kernels can read these: `dtype` on a CPU, without gaps in memory."""
    for tensor in tensors:  # noqa: SIM110  (a generator takes longer than the checks)
        if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return False
    return True
