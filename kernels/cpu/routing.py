"""Sums of each token's rows on a CPU, each row read once: see kernels/routing.py."""

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import supports
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, floats, ints, narrow, share, wide
from kernels.op import supports_if
from kernels.routing import rows_of_pairs


@Kernel
def _combine(pointer):
    # a: 0 y, 1 rows of pairs, 2 weights fp32 or 0, 3 out (written), 4 tokens, 5 k, 6 columns
    a = arguments(pointer, 7)
    tokens, k, columns = a[4], a[5], a[6]
    rows = ints(a[1], 0, tokens * k)
    first, behind = share(tokens)
    total = np.empty(columns, dtype=np.float32)
    for t in range(first, behind):
        out = bf16s(a[3], t * columns, columns)
        for i in range(columns):
            total[i] = np.float32(0.0)
        for j in range(k):
            weight = np.float32(1.0)
            if a[2] != 0:
                weight = floats(a[2], t * k + j, 1)[0]
            y = bf16s(a[0], rows[t * k + j] * columns, columns)
            for i in range(columns):
                total[i] += weight * wide(y[i])
        for i in range(columns):
            out[i] = narrow(total[i])


@Kernel
def _combine_backward(pointer):
    # a: 0 dout, 1 y, 2 rows of pairs, 3 weights fp32, 4 dy and 5 dweights fp32 (written), 6 tokens, 7 k, 8 columns
    a = arguments(pointer, 9)
    tokens, k, columns = a[6], a[7], a[8]
    rows, weights, dweights = ints(a[2], 0, tokens * k), floats(a[3], 0, tokens * k), floats(a[5], 0, tokens * k)
    first, behind = share(tokens)
    for t in range(first, behind):
        dout = bf16s(a[0], t * columns, columns)
        for pair in range(t * k, t * k + k):
            y, dy = bf16s(a[1], rows[pair] * columns, columns), bf16s(a[4], rows[pair] * columns, columns)
            weight, along = weights[pair], np.float32(0.0)
            for i in range(columns):
                along += wide(dout[i]) * wide(y[i])
                dy[i] = narrow(weight * wide(dout[i]))
            dweights[pair] = along


def _fits(y: Tensor, order: Tensor) -> bool:
    return supports(y) and supports(order, dtype=torch.int64)


@supports_if(lambda y, order, weights, k: _fits(y, order))
def combine(y: Tensor, order: Tensor, weights: Tensor | None, k: int) -> Tensor:
    out = y.new_empty(len(order) // k, y.shape[1])
    wide_weights = None if weights is None else weights.float().contiguous()
    address = 0 if wide_weights is None else wide_weights
    _combine(y, rows_of_pairs(order, k), address, out, len(out), k, y.shape[1])
    return out


@supports_if(lambda dout, y, order, weights: supports(dout) and _fits(y, order))
def combine_backward(dout: Tensor, y: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    k, dy = weights.shape[1], torch.empty_like(y)
    wide_weights = weights.float().contiguous()
    dweights = torch.empty_like(wide_weights)
    rows = rows_of_pairs(order, k)
    _combine_backward(dout, y, rows, wide_weights, dy, dweights, len(weights), k, y.shape[1])
    return dy, dweights.to(weights.dtype)
