"""Adapted linears of one input in plain torch, one after the other: see kernels/joined.py."""

import torch
from torch import Tensor

from kernels.reference.dora import dora_linear, dora_linear_backward
from kernels.reference.lora import lora_linear, lora_linear_backward
from kernels.weight import Weight


def joined_linears(
    x: Tensor,
    weights: list[Weight],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    magnitude: list[Tensor | None],
    norm_sq: list[Tensor | None],
    norm: list[Tensor | None],
    scaling: list[float],
) -> tuple[list[Tensor], list[Tensor]]:
    ys, xas, norms, gains = [], [], [], []
    for weight, A, B, m, n, known, s in zip(weights, lora_A, lora_B, magnitude, norm_sq, norm, scaling):
        if m is None:
            y, xa = lora_linear(x, weight, A, B, None, s, 0.0, None)
            own_norm, gain = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
        else:
            y, xa, own_norm, gain, _ = dora_linear(x, weight, n, known, A, B, m, None, s, 0.0, None)
        ys.append(y)
        xas.append(xa)
        norms.append(own_norm)
        gains.append(gain)
    a = torch.cat([(A * s).to(x.dtype) for A, s in zip(lora_A, scaling)])
    return ys, [a, torch.cat(xas, 1), *(B.to(x.dtype, copy=True) for B in lora_B), *norms, *gains]


def joined_linears_backward(
    dys: list[Tensor],
    x: Tensor,
    ys: list[Tensor | None],
    kept: list[Tensor],
    weights: list[Weight],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    magnitude: list[Tensor | None],
    scaling: list[float],
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    n = len(weights)
    xas = kept[1].split([len(A) for A in lora_A], 1)
    norms, gains = kept[2 + n : 2 + 2 * n], kept[2 + 2 * n :]
    dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    dAs, dBs, dms = [], [], []
    for i, (dy, weight, A, B, m, s) in enumerate(zip(dys, weights, lora_A, lora_B, magnitude, scaling)):
        if m is None:
            part, dA, dB = lora_linear_backward(dy, x, xas[i], weight, A, B, s, 0.0, None, needs_dx)
            dm = x.new_empty(0)
        else:
            rest = (norms[i], gains[i], weight, A, B, m, s, 0.0, None, needs_dx)
            part, dA, dB, dm = dora_linear_backward(dy, x, xas[i], ys[i], x.new_empty(0), *rest)
        if needs_dx:
            dx += part
        dAs.append(dA)
        dBs.append(dB)
        dms.append(dm)
    return (dx.to(x.dtype) if needs_dx else x.new_empty(0)), dAs, dBs, dms
