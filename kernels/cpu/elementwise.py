"""The gated MLP's product, rotary position embedding, and an adapter's factors in the dtype of the products."""

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.code import Kernel, arguments, bf16s, exp, narrow, number, rounded, share, wide


@Kernel
def _swiglu(pointer):
    a = arguments(pointer, 4)
    first, behind = share(a[3])
    n = behind - first
    gate, up, y = bf16s(a[0], first, n), bf16s(a[1], first, n), bf16s(a[2], first, n)
    for i in range(n):
        x = wide(gate[i])
        y[i] = narrow(rounded(x / (np.float32(1.0) + exp(-x))) * wide(up[i]))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up, bf16 as they are. Shazeer 2020, "GLU Variants Improve Transformer"."""
    y = torch.empty_like(gate)
    _swiglu(gate, up, y, y.numel())
    return y


@Kernel
def _swiglu_backward(pointer):
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


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), bf16 as dy, gate and up."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_backward(dy, gate, up, dgate, dup, dy.numel())
    return dgate, dup


@Kernel
def _rotate(pointer):
    a = arguments(pointer, 17)
    tokens, heads, half = a[5], a[6], a[7]
    sign = number(a[16])
    first, behind = share(a[4] * tokens)
    for place in range(first, behind):
        batch, token = place // tokens, place % tokens
        table = batch * a[14] + token * a[15]
        cos1, cos2 = bf16s(a[1], table, half), bf16s(a[1], table + half, half)
        sin1, sin2 = bf16s(a[2], table, half), bf16s(a[2], table + half, half)
        if sign > 0:
            sin1, sin2 = sin2, sin1
        for head in range(heads):
            start = batch * a[8] + head * a[9] + token * a[10]
            x1, x2 = bf16s(a[0], start, half), bf16s(a[0], start + half, half)
            there = batch * a[11] + head * a[12] + token * a[13]
            y1, y2 = bf16s(a[3], there, half), bf16s(a[3], there + half, half)
            for i in range(half):
                u, v = wide(x1[i]), wide(x2[i])
                y1[i] = narrow(rounded(u * wide(cos1[i])) + sign * rounded(v * wide(sin1[i])))
                y2[i] = narrow(rounded(v * wide(cos2[i])) - sign * rounded(u * wide(sin2[i])))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Rotary embedding of x, or what its backward makes of dy = x.

    x bf16 [batch, heads, tokens, d], dense in any order but with d last; cos, sin bf16 [batch or 1, 1, tokens, d]. The
    result lies in memory as the products want it: attention's [batch, heads, tokens, d], in backward those of the
    linears [batch, tokens, heads, d].
    """
    batch, heads, tokens, d = x.shape
    y = x.new_empty(batch, tokens, heads, d).transpose(1, 2) if backward else x.new_empty(x.shape)
    _rotate(
        *(x, cos, sin, y, batch, tokens, heads, d // 2, *x.stride()[:3], *y.stride()[:3]),
        *(cos.stride(0) if len(cos) > 1 else 0, cos.stride(2), 1.0 if backward else -1.0),
    )
    return y
