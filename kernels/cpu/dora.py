"""DoRA on a CPU: see kernels/dora.py.

Matrix products are PyTorch's. In bf16 one pass finishes the norm and makes the gain. Another pass scales the columns
and sums dm.
"""

import ctypes
import functools

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import supports
from kernels.cpu.lora import adapted, factors, gradients
from kernels.cpu.nf4 import dense
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, floats, ints, narrow, number, share, thread, wide
from kernels.dora import over_norm
from kernels.dropout import dropout as drop
from kernels.weight import Weight


@Kernel
def _scale_columns(pointer):
    # a: 0 dy, 1 y or z, 2 gain, 3 dz (written), 4 a sum of dy ⊙ y a thread (written), 5 rows, 6 columns
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


@Kernel
def _scale_columns_in_place(pointer):
    # a: 0 z (becomes gain ⊙ z), 1 gain, 2 rows, 3 columns
    a = arguments(pointer, 4)
    rows, columns = a[2], a[3]
    gain = floats(a[1], 0, columns)
    first, behind = share(rows)
    for row in range(first, behind):
        x = bf16s(a[0], row * columns, columns)
        for i in range(columns):
            x[i] = narrow(wide(x[i]) * gain[i])


@functools.partial(Kernel, parallel=False)
def _gram(pointer):
    # a: 0 x, 1 x xᵀ (written), 2 rows, 3 columns
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
def _norm_kernel(pointer):
    # a: 0 u, 1 B, 2 v, 3 norm_sq, 4 magnitude, 5 norm and 6 gain (written), 7 rows, 8 rank, 9 s², 10 least,
    #    11 cancelled (written)
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


def factored_norm(
    u: Tensor, lora_B: Tensor, v: Tensor, norm_sq: Tensor, magnitude: Tensor, scaling: float, least: float
) -> tuple[Tensor, Tensor, bool]:
    """Returns (norm, gain, cancelled), norm and gain fp32 [out].

    norm = √(‖W‖² + Σ B ⊙ (2u + s²v)) of each row; it is −1 where it is below √least · ‖W‖. gain = magnitude / norm; it
    is 0 where the norm is 0. cancelled: True if a row has norm −1.

    u = s·WAᵀ bf16 [out, rank]; lora_B and v = BAAᵀ fp32 [out, rank]; norm_sq = ‖W‖² and magnitude fp32 [out].
    """
    norm, gain = torch.empty_like(norm_sq), torch.empty_like(norm_sq)
    cancelled = ctypes.c_int64(0)
    more = (*u.shape, scaling**2, least, ctypes.addressof(cancelled))
    _norm_kernel(u, lora_B, v, norm_sq, magnitude, norm, gain, *more)
    return norm, gain, bool(cancelled.value)


@functools.partial(Kernel, parallel=False)
def _look_below(pointer):
    # a: 0 x, 1 number of values, 2 limit, 3 found (written)
    a = arguments(pointer, 4)
    x, limit, found = floats(a[0], 0, a[1]), number(a[2]), np.int64(0)
    for i in range(a[1]):
        found |= np.int64(abs(x[i]) < limit)
    ints(a[3], 0, 1)[0] = found


def has_below(x: Tensor, limit: float) -> bool:
    """Whether some |x| < limit, fp32."""
    found = ctypes.c_int64(0)
    _look_below(x, x.numel(), limit, ctypes.addressof(found))
    return bool(found.value)


def weight_norm_sq(weight: Weight) -> Tensor:
    w = weight.values if not weight.packed else dense(weight, torch.float32)
    return w.float().square().sum(dim=1)


def dora_norm(weight: Weight, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    w = dense(weight, weight.dtype)
    a = (lora_A * scaling).to(w.dtype)
    return norm_and_gain(w, norm_sq, lora_A, lora_B, a, scaling, norm_sq)[0]


def norm_and_gain(
    w: Tensor, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, a: Tensor, scaling: float, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """(‖W + sBA‖ of each row, magnitude over it) fp32 [out]; `a` is sA in w's dtype."""
    u = torch.mm(w, a.t())  # s·WAᵀ [out, r]
    A, B = lora_A.float(), lora_B.float()
    by_kernel = supports(u) and supports(A, B, norm_sq, magnitude, dtype=torch.float32)
    v = torch.mm(B, gram(A) if by_kernel else torch.mm(A, A.t()))
    # Where little is left of ‖W‖² the terms have cancelled, and their rounding with them has grown: compute the row
    # directly. The coarsest rounding is that of WAᵀ, in w's dtype. (sBA cannot be much longer than W there.)
    least = max(4e-3, 64 * torch.finfo(w.dtype).eps)
    if by_kernel:
        norm, gain, cancelled = factored_norm(u, B, v, norm_sq, magnitude, scaling, least)
    else:
        total = norm_sq + (B * torch.add(2 * u.float(), v, alpha=scaling**2)).sum(dim=1)
        norm = total.sqrt().masked_fill_(total < norm_sq * least, -1.0)
        gain = over_norm(magnitude, norm)
        cancelled = norm.amin() < 0
    if cancelled:
        rows = (norm < 0).nonzero().squeeze(1)
        norm[rows] = (w[rows].float() + scaling * B[rows] @ A).square().sum(dim=1).sqrt_()
        gain[rows] = over_norm(magnitude[rows], norm[rows])
    return norm, gain


def dora_linear(
    x: Tensor,
    weight: Weight,
    norm_sq: Tensor,
    norm: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = dense(weight, x.dtype)
    a, b = factors(lora_A, lora_B, scaling, 1.0, x.dtype)
    if norm is None:
        norm, gain = norm_and_gain(w, norm_sq, lora_A, lora_B, a, scaling, magnitude)
    else:
        norm, gain = norm.clone(), over_norm(magnitude, norm)
    xd = drop(x, dropout, seed)
    z, xa = adapted(xd, xd, w, a, b)
    if not dropout and bias is None:
        return scale_columns_(z, gain), xa, norm, gain, x.new_empty(0)
    g = gain.to(x.dtype)
    if dropout:
        # (x - drop(x))Wᵀ + g ⊙ z: elements dropped from the adapter still pass the base
        y = ((x - xd) @ w.t()).addcmul_(z, g)
        return (y if bias is None else y.add_(bias)), xa, norm, gain, z
    return torch.addcmul(bias.to(x.dtype), z, g), xa, norm, gain, z


def dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    z: Tensor,
    norm: Tensor,
    gain: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = dense(weight, x.dtype)
    dz, total = scale_columns(dy, z if y is None else y, gain)
    xd = drop(x, dropout, seed)
    dx, dA, dB = gradients(dz, xd, xa, w if needs_dx else None, lora_A, lora_B, scaling)
    if dropout and needs_dx:
        dx = drop(dx, dropout, seed)
        through_base = dy @ w
        dx += through_base - drop(through_base, dropout, seed)
    if y is None:
        return dx, dA, dB, over_norm(total, norm).to(magnitude.dtype)
    dm = magnitude_gradient(total, dy, xd, w, lora_A, lora_B, magnitude, scaling, norm, gain)
    return dx, dA, dB, dm


def magnitude_gradient(
    total: Tensor,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    norm: Tensor,
    gain: Tensor,
) -> Tensor:
    """dm where `total` is Σ_t dy ⊙ y: z / ‖W + sBA‖ = y / m."""
    dm = total / magnitude
    # Where m = 0, or nearly, y has lost z's digits: compute z again.
    tiny = torch.finfo(x.dtype).tiny
    if has_below(gain, tiny) if supports(gain, dtype=torch.float32) else (gain.abs() < tiny).any():
        rows = (gain.abs() < tiny).nonzero().squeeze(1)
        a, b = factors(lora_A, lora_B[rows], scaling, 1.0, x.dtype)
        z_rows, _ = adapted(x, x, w[rows], a, b)
        dm[rows] = over_norm(scale_columns(dy[:, rows], z_rows, gain[rows])[1], norm[rows])
    return dm.to(magnitude.dtype)


def scale_columns(dy: Tensor, kept: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(dz = gain ⊙ dy [T, out] in dy's dtype, Σ_t dy ⊙ kept fp32 [out]); dy, kept [T, out], gain fp32 [out]."""
    if not supports(dy, kept):
        return dy * gain.to(dy.dtype), (dy * kept).sum(dim=0, dtype=torch.float32)
    dz, totals = torch.empty_like(dy), gain.new_zeros(torch.get_num_threads(), len(gain))
    _scale_columns(dy, kept, gain, dz, totals, *dy.shape)
    return dz, totals.sum(0)


def scale_columns_(z: Tensor, gain: Tensor) -> Tensor:
    """gain ⊙ z in z's place; z [T, out], gain fp32 [out]."""
    if not supports(z):
        return z.mul_(gain.to(z.dtype))
    _scale_columns_in_place(z, gain, *z.shape)
    return z
