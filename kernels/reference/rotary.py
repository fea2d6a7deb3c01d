"""Rotary position embedding in plain torch, the bits of transformers' own: see kernels/rotary.py."""

import torch
from torch import Tensor

from kernels.rotary import gradient_of


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = torch.mul(x, cos, out=x.new_empty(x.shape))
    y[..., :half].sub_(x[..., half:] * sin[..., :half])
    y[..., half:].add_(x[..., :half] * sin[..., half:])
    return y


def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated_back(dq, cos, sin), _rotated_back(dk, cos, sin)


def _rotated_back(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = dy.shape[-1] // 2
    dx = torch.mul(dy, cos, out=gradient_of(dy, cos))
    dx[..., :half].add_(dy[..., half:] * sin[..., half:])
    dx[..., half:].sub_(dy[..., :half] * sin[..., :half])
    return dx
