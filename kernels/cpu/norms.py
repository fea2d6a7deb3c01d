"""RMSNorm, and what DoRA does to the rows of a weight and the columns of an output."""

import ctypes
import functools

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.code import Kernel, arguments, bf16s, floats, ints, narrow, number, rounded, share, thread, wide


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


@Kernel
def _scale_columns(pointer):
    a = arguments(pointer, 7)
    rows, columns = a[5], a[6]
    gain, total = floats(a[2], 0, columns), floats(a[4], thread() * columns, columns)
    first, behind = share(rows)
    for row in range(first, behind):
        start = row * columns
        dy, y, dz = bf16s(a[0], start, columns), bf16s(a[1], start, columns), bf16s(a[3], start, columns)
        for i in range(columns):
            total[i] += wide(dy[i]) * wide(y[i])
            dz[i] = narrow(wide(dy[i]) * gain[i])


def scale_columns(dy: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(dz = gain ⊙ dy bf16 [rows, n], Σ over rows of dy ⊙ y fp32 [n]); dy, y bf16 [rows, n], gain fp32 [n]."""
    dz, totals = torch.empty_like(dy), gain.new_zeros(torch.get_num_threads(), len(gain))
    _scale_columns(dy, y, gain, dz, totals, *dy.shape)
    return dz, totals.sum(0)


@Kernel
def _scale_columns_in_place(pointer):
    a = arguments(pointer, 4)
    rows, columns = a[2], a[3]
    gain = floats(a[1], 0, columns)
    first, behind = share(rows)
    for row in range(first, behind):
        x = bf16s(a[0], row * columns, columns)
        for i in range(columns):
            x[i] = narrow(wide(x[i]) * gain[i])


def scale_columns_(x: Tensor, gain: Tensor) -> Tensor:
    """x ⊙ gain in x's place: bf16 [rows, n], fp32 [n]."""
    _scale_columns_in_place(x, gain, *x.shape)
    return x


@functools.partial(Kernel, parallel=False)
def _gram(pointer):
    a = arguments(pointer, 4)
    rows, columns = a[2], a[3]
    product = floats(a[1], 0, rows * rows)
    for i in range(rows):
        x = floats(a[0], i * columns, columns)
        for j in range(rows):
            y = floats(a[0], j * columns, columns)
            total = np.float32(0.0)
            for k in range(columns):
                total += x[k] * y[k]
            product[i * rows + j] = total


def gram(x: Tensor) -> Tensor:
    """x xᵀ of a few rows, fp32 [rows, n]: [rows, rows]."""
    product = x.new_empty(len(x), len(x))
    _gram(x, product, *x.shape)
    return product


@functools.partial(Kernel, parallel=False)
def _dora_norm(pointer):
    a = arguments(pointer, 12)
    rows, rank, factor, least = a[7], a[8], number(a[9]), number(a[10])
    cancelled = ints(a[11], 0, 1)
    norm_sq, magnitude = floats(a[3], 0, rows), floats(a[4], 0, rows)
    norm, gain = floats(a[5], 0, rows), floats(a[6], 0, rows)
    for row in range(rows):
        start = row * rank
        u, b, v = bf16s(a[0], start, rank), floats(a[1], start, rank), floats(a[2], start, rank)
        total = np.float32(0.0)
        for i in range(rank):
            total += b[i] * (wide(u[i]) + wide(u[i]) + factor * v[i])
        total += norm_sq[row]
        length = np.sqrt(total)
        if total < norm_sq[row] * least:
            length = np.float32(-1.0)
            cancelled[0] = 1
        norm[row] = length
        gain[row] = np.float32(0.0) if length == np.float32(0.0) else magnitude[row] / length


def dora_norm(
    u: Tensor, lora_B: Tensor, v: Tensor, norm_sq: Tensor, magnitude: Tensor, scaling: float, least: float
) -> tuple[Tensor, Tensor, bool]:
    """(√(‖W‖² + Σ B ⊙ (2u + s²v)) of each row, and -1 where that is under √least · ‖W‖; magnitude over it or 0; whether
    there is such a row): fp32 [out].

    u = s·WAᵀ bf16 [out, rank]; lora_B and v = BAAᵀ fp32 [out, rank]; norm_sq = ‖W‖² and magnitude fp32 [out].
    """
    norm, gain = torch.empty_like(norm_sq), torch.empty_like(norm_sq)
    cancelled = ctypes.c_int64(0)
    more = (*u.shape, scaling**2, least, ctypes.addressof(cancelled))
    _dora_norm(u, lora_B, v, norm_sq, magnitude, norm, gain, *more)
    return norm, gain, bool(cancelled.value)


@functools.partial(Kernel, parallel=False)
def _has_below(pointer):
    a = arguments(pointer, 4)
    x, limit, found = floats(a[0], 0, a[1]), number(a[2]), np.int64(0)
    for i in range(a[1]):
        found |= np.int64(abs(x[i]) < limit)
    ints(a[3], 0, 1)[0] = found


def has_below(x: Tensor, limit: float) -> bool:
    """Whether some |x| < limit, fp32."""
    found = ctypes.c_int64(0)
    _has_below(x, x.numel(), limit, ctypes.addressof(found))
    return bool(found.value)
