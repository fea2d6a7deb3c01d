"""RMSNorm in plain torch: see kernels/rms_norm.py."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * r).to(x.dtype), r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool) -> tuple[Tensor, Tensor]:
    dx = (dy * weight).to(r.dtype).mul_(r)
    along = (dx * x).mean(-1, keepdim=True).mul_(r.square())
    dx.addcmul_(x.to(r.dtype), along, value=-1)
    if not needs_dweight:
        return dx.to(x.dtype), weight.new_empty(0)
    dweight = (dy * (x * r)).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    h = x + residual
    y, r = rms_norm(h, weight, eps)
    return y, h, r


def add_rms_norm_backward(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx, dweight = rms_norm_backward(dy, h, weight, r, needs_dweight)
    return dx + dh, dweight
