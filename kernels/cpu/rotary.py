"""Rotary position embedding on a CPU: see kernels/rotary.py."""

from torch import Tensor

from kernels.cpu import supports
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, narrow, number, rounded, share, wide
from kernels.op import supports_if
from kernels.rotary import gradient_of


@Kernel
def _rotate(pointer):
    # a: 0 x, 1 cos, 2 sin, 3 y (written), 4 batch, 5 tokens, 6 heads, 7 half of d, 8 … 10 x's strides and 11 … 13 y's
    #    (batch, head, token), 14 and 15 the strides of cos and sin (batch, token), 16 the sign: 1 in backward, else -1
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


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool) -> Tensor:
    """y: x turned by the angles, back in `backward`."""
    batch, heads, tokens, d = x.shape
    _rotate(
        *(x, cos, sin, y, batch, tokens, heads, d // 2, *x.stride()[:3], *y.stride()[:3]),
        *(cos.stride(0) if len(cos) > 1 else 0, cos.stride(2), 1.0 if backward else -1.0),
    )
    return y


def _supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Of [batch, heads, tokens, d], without gaps in memory in this order or as a model's linears leave them."""
    for x in (q, k):
        dense = x.transpose(1, 2)
        if cos.shape[1:] != (1, *x.shape[2:]) or not supports(dense if dense.is_contiguous() else x, cos, sin):
            return False
    return True


@supports_if(_supports)
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(_rotated(x, cos, sin, x.new_empty(x.shape), backward=False) for x in (q, k))


@supports_if(_supports)
def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(_rotated(dy, cos, sin, gradient_of(dy, cos), backward=True) for dy in (dq, dk))
