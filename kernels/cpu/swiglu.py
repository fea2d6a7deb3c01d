"""The gated MLP's product on a CPU: see kernels/swiglu.py."""

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import supports
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, exp, narrow, rounded, share, wide
from kernels.op import supports_if


@Kernel
def _swiglu(pointer):
    # a: 0 gate, 1 up, 2 y (written), 3 number of values
    a = arguments(pointer, 4)
    first, behind = share(a[3])
    n = behind - first
    gate, up, y = bf16s(a[0], first, n), bf16s(a[1], first, n), bf16s(a[2], first, n)
    for i in range(n):
        x = wide(gate[i])
        y[i] = narrow(rounded(x / (np.float32(1.0) + exp(-x))) * wide(up[i]))


@supports_if(supports)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    _swiglu(gate, up, y, y.numel())
    return y


@Kernel
def _swiglu_backward(pointer):
    # a: 0 dy, 1 gate, 2 up, 3 dgate and 4 dup (written), 5 number of values
    a = arguments(pointer, 6)
    first, behind = share(a[5])
    n = behind - first
    dy, gate, up = bf16s(a[0], first, n), bf16s(a[1], first, n), bf16s(a[2], first, n)
    dgate, dup = bf16s(a[3], first, n), bf16s(a[4], first, n)
    one = np.float32(1.0)
    for i in range(n):
        x = wide(gate[i])
        sigmoid = one / (one + exp(-x))
        dup[i] = narrow(wide(dy[i]) * rounded(x * sigmoid))
        dgate[i] = narrow(rounded(wide(dy[i]) * wide(up[i])) * sigmoid * (one + x * (one - sigmoid)))


@supports_if(supports)
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_backward(dy, gate, up, dgate, dup, dy.numel())
    return dgate, dup
