"""Linears of experts on a CPU, one after the other: see kernels/experts.py.

PyTorch's products of 16 bits compile code for each shape that they meet (oneDNN), which takes a millisecond, and keep
that of the last 1024. Every expert has another number of rows, and another one in every step. So rows of zeros are
added up to one of a few numbers, of which there are eight between a power of two and the next.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from kernels import expert_loop
from kernels.cpu.dora import dora_linear, dora_linear_backward, dora_norm
from kernels.cpu.lora import lora_linear, lora_linear_backward
from kernels.cpu.nf4 import dense


def padded(rows: int) -> int:
    """The number of rows to compute with: at most an eighth more."""
    step = max(1, 2 ** (rows.bit_length() - 4))
    return -(-rows // step) * step


def in_few_shapes(compute: Callable, given: int, found: tuple[int, ...] = (0,)) -> Callable:
    """`compute`, whose first `given` arguments have as many rows as the first one, and so have its results `found`."""

    def run(*args):
        rows = len(args[0])
        more = padded(rows) - rows
        if not more or args[0].dtype == torch.float32:
            return compute(*args)
        of_rows = [pad(arg, (0, 0, 0, more)) if _has(arg, rows) else arg for arg in args[:given]]
        results = compute(*of_rows, *args[given:])
        if isinstance(results, Tensor):
            return results[:rows]
        return tuple(part[:rows] if i in found and _has(part, rows + more) else part for i, part in enumerate(results))

    return run


def _has(tensor: Tensor | None, rows: int) -> bool:
    return tensor is not None and tensor.dim() == 2 and len(tensor) == rows


_linear = in_few_shapes(linear, 1)
_lora, _lora_backward = in_few_shapes(lora_linear, 1, (0, 1)), in_few_shapes(lora_linear_backward, 3)
_dora, _dora_backward = in_few_shapes(dora_linear, 1, (0, 1, 4)), in_few_shapes(dora_linear_backward, 5)

experts_linear = partial(expert_loop.experts_linear, dense, _linear)
experts_linear_backward = partial(expert_loop.experts_linear_backward, dense, _linear)
experts_lora = partial(expert_loop.experts_lora, dense, _lora)
experts_lora_backward = partial(expert_loop.experts_lora_backward, dense, _lora_backward)
experts_dora = partial(expert_loop.experts_dora, dense, _dora)
experts_dora_backward = partial(expert_loop.experts_dora_backward, dense, _dora_backward)
experts_norm = partial(expert_loop.experts_norm, dense, dora_norm)
