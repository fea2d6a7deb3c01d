"""RMSNorm, and what DoRA does to the rows of a weight and the columns of an output."""

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.code import Kernel, arguments, bf16s, floats, narrow, number, rounded, share, wide


@Kernel
def _rms_norm(pointer):
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y = w ⊙ x · scale, rounded where transformers rounds; scale = 1 / √(mean x² + ε), fp32 [..., 1])

    x bf16 [..., n], weight bf16 [n].
    """
    y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _rms_norm(x, weight, y, scale, scale.numel(), x.shape[-1], eps)
    return y, scale


@Kernel
def _rms_norm_backward(pointer):
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


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dx = scale · (w ⊙ dy) − x · scale³ · mean(w ⊙ dy ⊙ x), bf16 as dy and x [..., n]."""
    dx = torch.empty_like(x)
    _rms_norm_backward(dy, x, weight, scale, dx, scale.numel(), x.shape[-1])
    return dx
