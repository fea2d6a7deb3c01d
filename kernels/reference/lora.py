"""LoRA in plain torch: see kernels/lora.py. Products and their results are in x's dtype."""

import torch
from torch import Tensor

from kernels.dropout import dropout as drop
from kernels.reference.nf4 import dense
from kernels.reference.nf4_linear import linear
from kernels.weight import Weight


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
    xd = drop(x, dropout, seed)
    return adapted(x, xd, dense(weight, x.dtype), (lora_A * scaling).to(x.dtype), lora_B.to(x.dtype), bias)


def adapted(
    x: Tensor, xd: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(xWᵀ + xa·bᵀ + bias, xa = xd·aᵀ), all in x's dtype."""
    xa = torch.mm(xd, a.t())
    y = linear(xa, b, bias)  # the small term first: rounding it loses the least
    y.addmm_(x, w.t())
    return y, xa


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
    dxa = torch.mm(dy, (lora_B * scaling).to(x.dtype))  # [T, r]
    dA, dB = torch.mm(dxa.t(), drop(x, p, seed)), torch.mm(dy.t(), xa)
    if w is None:
        dx = x.new_empty(0)
    else:
        dx = drop(torch.mm(dxa, lora_A.to(x.dtype)), p, seed)
        dx.addmm_(dy, w)
    return dx, dA.to(lora_A.dtype), dB.to(lora_B.dtype)
