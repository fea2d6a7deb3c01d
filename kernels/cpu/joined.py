"""Adapted linears of one input on a CPU: see kernels/joined.py."""

import torch
from torch import Tensor

from kernels.cpu.dora import magnitude_gradient, norm_and_gain, scale_columns, scale_columns_
from kernels.cpu.lora import factors, wide_gradients
from kernels.cpu.nf4 import dense
from kernels.dora import over_norm
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
    ranks = [len(A) for A in lora_A]
    a_all = x.new_empty(sum(ranks), x.shape[1])
    parts = a_all.split(ranks)
    bs = [factors(A, B, s, 1.0, x.dtype, a)[1] for A, B, s, a in zip(lora_A, lora_B, scaling, parts)]
    bs = [b.clone() if b is B else b for b, B in zip(bs, lora_B)]  # a result must not be an argument
    xa_all = torch.mm(x, a_all.t())
    ys, norms, gains = [], [], []
    for i, (weight, xa, a, b) in enumerate(zip(weights, xa_all.split(ranks, 1), parts, bs)):
        w = dense(weight, x.dtype)
        if magnitude[i] is None:
            own_norm, gain = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
        elif norm[i] is None:
            own_norm, gain = norm_and_gain(w, norm_sq[i], lora_A[i], lora_B[i], a, scaling[i], magnitude[i])
        else:
            own_norm, gain = norm[i].clone(), over_norm(magnitude[i], norm[i])
        y = torch.nn.functional.linear(xa, b).addmm_(x, w.t())
        ys.append(y if magnitude[i] is None else scale_columns_(y, gain))
        norms.append(own_norm)
        gains.append(gain)
    return ys, [a_all, xa_all, *bs, *norms, *gains]


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
    n, ranks = len(weights), [len(A) for A in lora_A]
    a_all, xa_all, bs = kept[0], kept[1], kept[2 : 2 + n]
    norms, gains = kept[2 + n : 2 + 2 * n], kept[2 + 2 * n :]
    scaled = [
        (dy, None) if m is None else scale_columns(dy, y, gain) for dy, y, m, gain in zip(dys, ys, magnitude, gains)
    ]
    dxa_all = torch.cat([torch.mm(dz, b) for (dz, _), b in zip(scaled, bs)], 1)
    dA_all = torch.mm(dxa_all.t(), x)
    dx = torch.mm(dxa_all, a_all) if needs_dx else x.new_empty(0)
    dAs, dBs, dms = [], [], []
    xas, dA_parts = xa_all.split(ranks, 1), dA_all.split(ranks)
    for i, (weight, (dz, total), A, B, m, s) in enumerate(zip(weights, scaled, lora_A, lora_B, magnitude, scaling)):
        if needs_dx or m is not None:
            w = dense(weight, x.dtype)
        if needs_dx:
            dx.addmm_(dz, w)
        dA, dB = wide_gradients(dA_parts[i], torch.mm(dz.t(), xas[i]), A, B, s)
        dAs.append(dA)
        dBs.append(dB)
        if m is None:
            dms.append(x.new_empty(0))
        else:
            dms.append(magnitude_gradient(total, dys[i], x, w, A, B, m, s, norms[i], gains[i]))
    return dx, dAs, dBs, dms
