"""The linear over a packed weight in plain torch: see kernels/nf4_linear.py."""

import torch
from torch import Tensor

from kernels.reference.nf4 import dense
from kernels.weight import Weight


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """xWᵀ + bias in x's dtype."""
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def nf4_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return linear(x, dense(weight, x.dtype), bias)


def nf4_linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    return dy @ dense(weight, dy.dtype)
