"""The linear over a packed weight on a CPU: see kernels/nf4_linear.py."""

import torch
from torch import Tensor

from kernels.cpu.nf4 import dense
from kernels.weight import Weight


def nf4_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def nf4_linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    return dy @ dense(weight, dy.dtype)
