"""DoRA in plain torch: see kernels/dora.py."""

import torch
from torch import Tensor

from kernels.dora import over_norm
from kernels.dropout import dropout as drop
from kernels.reference.lora import adapted, gradients
from kernels.reference.nf4 import dense
from kernels.weight import Weight


def weight_norm_sq(weight: Weight) -> Tensor:
    w = weight.values if not weight.packed else dense(weight, torch.float32)
    return w.float().square().sum(dim=1)


def dora_norm(weight: Weight, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return norm_of(dense(weight, weight.dtype), norm_sq, lora_A, lora_B, scaling)


def norm_of(w: Tensor, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + sBA‖ of each row, fp32 [out], in factored form; `norm_sq` is ‖W‖², fp32 [out]."""
    u = torch.mm(w, (lora_A * scaling).to(w.dtype).t())  # s·WAᵀ [out, r]
    A, B = lora_A.float(), lora_B.float()
    v = torch.mm(B, torch.mm(A, A.t()))
    total = norm_sq + (B * torch.add(2 * u.float(), v, alpha=scaling**2)).sum(dim=1)
    # Where little is left of ‖W‖² the terms have cancelled, and their rounding with them has grown: compute the row
    # directly. The coarsest rounding is that of WAᵀ, in w's dtype. (sBA cannot be much longer than W there.)
    least = max(4e-3, 64 * torch.finfo(w.dtype).eps)
    norm, rows = total.sqrt(), (total < norm_sq * least).nonzero().squeeze(1)
    if len(rows):
        norm[rows] = (w[rows].float() + scaling * B[rows] @ A).square().sum(dim=1).sqrt_()
    return norm


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
    norm = norm_of(w, norm_sq, lora_A, lora_B, scaling) if norm is None else norm.clone()
    gain = over_norm(magnitude, norm)
    xd = drop(x, dropout, seed)
    z, xa = adapted(xd, xd, w, (lora_A * scaling).to(x.dtype), lora_B.to(x.dtype))
    g = gain.to(x.dtype)
    if dropout:
        # (x - drop(x))Wᵀ + g ⊙ z: elements dropped from the adapter still pass the base
        y = ((x - xd) @ w.t()).addcmul_(z, g)
        return (y if bias is None else y.add_(bias)), xa, norm, gain, z
    if bias is None:
        return z.mul_(g), xa, norm, gain, x.new_empty(0)
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
    total = (dy * (z if y is None else y)).sum(dim=0, dtype=torch.float32)
    dz = dy * gain.to(dy.dtype)
    xd = drop(x, dropout, seed)
    dx, dA, dB = gradients(dz, xd, xa, w if needs_dx else None, lora_A, lora_B, scaling)
    if dropout and needs_dx:
        dx = drop(dx, dropout, seed)
        through_base = dy @ w
        dx += through_base - drop(through_base, dropout, seed)
    dm = over_norm(total, norm) if y is None else total / magnitude  # z / ‖W + sBA‖ = y / m
    if y is not None:
        # Where m = 0, or nearly, y has lost z's digits: compute z again.
        rows = (gain.abs() < torch.finfo(x.dtype).tiny).nonzero().squeeze(1)
        if len(rows):
            z_rows, _ = adapted(xd, xd, w[rows], (lora_A * scaling).to(x.dtype), lora_B[rows].to(x.dtype))
            dm[rows] = over_norm((dy[:, rows] * z_rows).sum(dim=0, dtype=torch.float32), norm[rows])
    return dx, dA, dB, dm.to(magnitude.dtype)
