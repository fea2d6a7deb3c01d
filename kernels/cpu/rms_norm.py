"""RMSNorm on a CPU, a row at a time, alone or of a sum: see kernels/rms_norm.py."""

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import supports
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, floats, narrow, number, rounded, share, wide
from kernels.op import supports_if


@Kernel
def _rms_norm(pointer):
    # a: 0 x, 1 weight, 2 y and 3 r (written), 4 rows, 5 columns, 6 eps
    a = arguments(pointer, 7)
    rows, columns, eps = a[4], a[5], number(a[6])
    weight, scales = bf16s(a[1], 0, columns), floats(a[3], 0, rows)
    first, behind = share(rows)
    for row in range(first, behind):
        x, y = bf16s(a[0], row * columns, columns), bf16s(a[2], row * columns, columns)
        total = np.float32(0.0)
        for i in range(columns):
            total += wide(x[i]) * wide(x[i])
        scale = np.float32(1.0) / np.sqrt(total / np.float32(columns) + eps)
        scales[row] = scale
        for i in range(columns):
            y[i] = narrow(wide(weight[i]) * rounded(wide(x[i]) * scale))


@supports_if(lambda x, weight, eps: supports(x, weight))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, r = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _rms_norm(x, weight, y, r, r.numel(), x.shape[-1], eps)
    return y, r


@Kernel
def _rms_norm_backward(pointer):
    # a: 0 dy, 1 x, 2 weight, 3 r, 4 dx (written), 5 rows, 6 columns
    a = arguments(pointer, 7)
    rows, columns = a[5], a[6]
    weight, scales = bf16s(a[2], 0, columns), floats(a[3], 0, rows)
    first, behind = share(rows)
    for row in range(first, behind):
        start = row * columns
        dy, x, dx = bf16s(a[0], start, columns), bf16s(a[1], start, columns), bf16s(a[4], start, columns)
        along = np.float32(0.0)
        for i in range(columns):
            along += rounded(wide(dy[i]) * wide(weight[i])) * wide(x[i])
        scale = scales[row]
        along *= scale * scale * scale / np.float32(columns)
        for i in range(columns):
            dx[i] = narrow(rounded(wide(dy[i]) * wide(weight[i])) * scale - wide(x[i]) * along)


@supports_if(lambda dy, x, weight, r, needs_dweight: not needs_dweight and supports(dy, x, weight))
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    _rms_norm_backward(dy, x, weight, r, dx, r.numel(), x.shape[-1])
    return dx, weight.new_empty(0)


@Kernel
def _add_rms_norm(pointer):
    # a: 0 x, 1 residual, 2 weight, 3 y, 4 h and 5 r (written), 6 rows, 7 columns, 8 eps
    a = arguments(pointer, 9)
    rows, columns, eps = a[6], a[7], number(a[8])
    weight, scales = bf16s(a[2], 0, columns), floats(a[5], 0, rows)
    first, behind = share(rows)
    for row in range(first, behind):
        start = row * columns
        x, residual = bf16s(a[0], start, columns), bf16s(a[1], start, columns)
        y, h = bf16s(a[3], start, columns), bf16s(a[4], start, columns)
        total = np.float32(0.0)
        for i in range(columns):
            value = rounded(wide(x[i]) + wide(residual[i]))
            h[i] = narrow(value)
            total += value * value
        scale = np.float32(1.0) / np.sqrt(total / np.float32(columns) + eps)
        scales[row] = scale
        for i in range(columns):
            y[i] = narrow(wide(weight[i]) * rounded(wide(h[i]) * scale))


@supports_if(lambda x, residual, weight, eps: supports(x, residual, weight))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, h, r = torch.empty_like(x), torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _add_rms_norm(x, residual, weight, y, h, r, r.numel(), x.shape[-1], eps)
    return y, h, r


@Kernel
def _add_rms_norm_backward(pointer):
    # a: 0 dy, 1 dh, 2 h, 3 weight, 4 r, 5 dx (written), 6 rows, 7 columns
    a = arguments(pointer, 8)
    rows, columns = a[6], a[7]
    weight, scales = bf16s(a[3], 0, columns), floats(a[4], 0, rows)
    first, behind = share(rows)
    for row in range(first, behind):
        start = row * columns
        dy, dh = bf16s(a[0], start, columns), bf16s(a[1], start, columns)
        h, dx = bf16s(a[2], start, columns), bf16s(a[5], start, columns)
        along = np.float32(0.0)
        for i in range(columns):
            along += rounded(wide(dy[i]) * wide(weight[i])) * wide(h[i])
        scale = scales[row]
        along *= scale * scale * scale / np.float32(columns)
        for i in range(columns):
            own = rounded(wide(dy[i]) * wide(weight[i])) * scale - wide(h[i]) * along
            dx[i] = narrow(own + wide(dh[i]))


@supports_if(lambda dy, dh, h, weight, r, needs_dweight: not needs_dweight and supports(dy, dh, h, weight))
def add_rms_norm_backward(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(h)
    _add_rms_norm_backward(dy, dh, h, weight, r, dx, r.numel(), h.shape[-1])
    return dx, weight.new_empty(0)
