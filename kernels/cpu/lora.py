"""LoRA on a CPU: see kernels/lora.py.

Products are PyTorch's. In bf16 the adapter's factors, which are fp32, are scaled and cast in one call.
"""

import functools

import torch
from torch import Tensor

from kernels.cpu import supports
from kernels.cpu.nf4 import dense
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, floats, narrow, number, wide
from kernels.dropout import dropout as drop
from kernels.weight import Weight


@functools.partial(Kernel, parallel=False)
def _narrow(pointer):
    # a: two groups of 0 x, 1 y (written), 2 number of values, 3 factor
    a = arguments(pointer, 8)
    for i in range(2):
        n, factor = a[4 * i + 2], number(a[4 * i + 3])
        x, y = floats(a[4 * i], 0, n), bf16s(a[4 * i + 1], 0, n)
        for j in range(n):
            y[j] = narrow(x[j] * factor)


def narrowed(
    x: Tensor, y: Tensor, factor_x: float, factor_y: float, out_x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(factor_x · x, in `out_x` if it is given, factor_y · y) in bf16, of fp32."""
    narrow_x = torch.empty_like(x, dtype=torch.bfloat16) if out_x is None else out_x
    narrow_y = torch.empty_like(y, dtype=torch.bfloat16)
    _narrow(x, narrow_x, x.numel(), factor_x, y, narrow_y, y.numel(), factor_y)
    return narrow_x, narrow_y


@functools.partial(Kernel, parallel=False)
def _widen(pointer):
    # a: two groups of 0 x, 1 y (written), 2 number of values, 3 factor
    a = arguments(pointer, 8)
    for i in range(2):
        n, factor = a[4 * i + 2], number(a[4 * i + 3])
        x, y = bf16s(a[4 * i], 0, n), floats(a[4 * i + 1], 0, n)
        for j in range(n):
            y[j] = wide(x[j]) * factor


def widened(x: Tensor, y: Tensor, factor_x: float) -> tuple[Tensor, Tensor]:
    """(factor_x · x, y) in fp32, of bf16."""
    wide_x, wide_y = (torch.empty_like(t, dtype=torch.float32) for t in (x, y))
    _widen(x, wide_x, x.numel(), factor_x, y, wide_y, y.numel(), 1.0)
    return wide_x, wide_y


def factors(
    lora_A: Tensor, lora_B: Tensor, scale_A: float, scale_B: float, dtype: torch.dtype, a: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale_A · A, in `a` if it is given, scale_B · B) in `dtype`."""
    if dtype == torch.bfloat16 and supports(lora_A, lora_B, dtype=torch.float32):
        return narrowed(lora_A, lora_B, scale_A, scale_B, a)
    scaled_A, scaled_B = (lora_A * scale_A).to(dtype), (lora_B * scale_B).to(dtype)
    return (scaled_A if a is None else a.copy_(scaled_A)), scaled_B


def wide_gradients(
    dA: Tensor, dB: Tensor, lora_A: Tensor, lora_B: Tensor, scale_A: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(scale_A · dA, dB) in the dtypes of A and B. The first is a new tensor: dA may be a part of a larger one."""
    if lora_A.dtype == lora_B.dtype == torch.float32 and supports(dA, dB):
        return widened(dA, dB, scale_A)
    return dA.to(lora_A.dtype) * scale_A, dB.to(lora_B.dtype)


def adapted(
    x: Tensor, xd: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(xWᵀ + xa·bᵀ + bias, xa = xd·aᵀ), all in x's dtype."""
    xa = torch.mm(xd, a.t())
    # the small term first: rounding it loses the least
    y = torch.nn.functional.linear(xa, b, None if bias is None else bias.to(x.dtype))
    y.addmm_(x, w.t())
    return y, xa


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    a, b = factors(lora_A, lora_B, scaling, 1.0, x.dtype)
    return adapted(x, drop(x, dropout, seed), dense(weight, x.dtype), a, b, bias)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    w = dense(weight, x.dtype) if needs_dx else None
    return gradients(dy, x, xa, w, lora_A, lora_B, scaling, dropout, seed)


def gradients(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    w: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, or no element without w; dA; dB)"""
    a, b = factors(lora_A, lora_B, 1.0, scaling, x.dtype)
    dxa = torch.mm(dy, b)  # [T, r]
    dA, dB = torch.mm(dxa.t(), drop(x, p, seed)), torch.mm(dy.t(), xa)
    if w is None:
        dx = x.new_empty(0)
    else:
        dx = drop(torch.mm(dxa, a), p, seed)
        dx.addmm_(dy, w)
    return dx, *wide_gradients(dA, dB, lora_A, lora_B)
