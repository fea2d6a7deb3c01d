"""Rotary position embedding in Triton, queries and keys in one launch: see kernels/rotary.py.

A program turns a few heads of one token. Each product is rounded to the tensors' dtype before the sum, so that results
are transformers' bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.op import supports_if
from kernels.rotary import gradient_of
from kernels.triton.case import Case, meta
from kernels.triton.launch import cdiv, launch, next_power_of_2

TILE = 1024  # pairs a program turns: 8 a thread, so that loads are 128 bits wide in 16 bits
_Strides = tuple[int, int, int]  # of batch, tokens and heads


@triton.jit
def _turn(
    x_ptr, y_ptr, cos_ptr, sin_ptr, batch, token, heads, first_head,
    x_batch, x_token, x_head, y_batch, y_token, y_head,
    HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Heads first_head … of x at one token. cos_ptr and sin_ptr are at that token."""
    head = (first_head + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK_HALF)
    inside = (head < heads) & (i < HALF)[None, :]
    x_ptrs = x_ptr + batch * x_batch + token * x_token + head * x_head + i[None, :]
    y_ptrs = y_ptr + batch * y_batch + token * y_token + head * y_head + i[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x1 = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
    cos1 = tl.load(cos_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        turned1, turned2 = x2 * sin2, -x1 * sin1
    else:
        turned1, turned2 = -x2 * sin1, x1 * sin2
    y1 = (x1 * cos1).to(dtype).to(tl.float32) + turned1.to(dtype).to(tl.float32)
    y2 = (x2 * cos2).to(dtype).to(tl.float32) + turned2.to(dtype).to(tl.float32)
    tl.store(y_ptrs, y1.to(dtype), mask=inside)
    tl.store(y_ptrs + HALF, y2.to(dtype), mask=inside)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr,  # [batch, tokens, heads, d], any strides but 1 of d
    cos_ptr, sin_ptr,  # [batch or 1, tokens or 1, d], any strides but 1 of d
    turned_q_ptr, turned_k_ptr,  # as q and k
    tokens, q_heads, k_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    turned_q_batch, turned_q_token, turned_q_head, turned_k_batch, turned_k_token, turned_k_head,
    cos_batch, cos_token, sin_batch, sin_token,
    HALF: tl.constexpr,  # d / 2
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // tokens, place % tokens
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    q_tiles = tl.cdiv(q_heads, BLOCK_HEADS)
    tile = tl.program_id(1)
    if tile < q_tiles:
        _turn(
            q_ptr, turned_q_ptr, cos_ptr, sin_ptr, batch, token, q_heads, tile * BLOCK_HEADS,
            q_batch, q_token, q_head, turned_q_batch, turned_q_token, turned_q_head,
            HALF, BACKWARD, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
    else:
        _turn(
            k_ptr, turned_k_ptr, cos_ptr, sin_ptr, batch, token, k_heads, (tile - q_tiles) * BLOCK_HEADS,
            k_batch, k_token, k_head, turned_k_batch, turned_k_token, turned_k_head,
            HALF, BACKWARD, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip


@supports_if(lambda q, *_: q.dtype != torch.float64)  # the kernel computes in fp32
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, cos, sin, *turned, backward=False)
    return turned


@supports_if(lambda dq, *_: dq.dtype != torch.float64)  # the kernel computes in fp32
def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = gradient_of(dq, cos), gradient_of(dk, cos)
    _launch(dq, dk, cos, sin, *turned, backward=True)
    return turned


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turned_q: Tensor, turned_k: Tensor, backward: bool) -> None:
    heads_first = cos.shape[1] == 1
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))

    def strides(x: Tensor) -> _Strides:
        batch, second, third = (stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape[:3]))
        return (batch, third, second) if heads_first else (batch, second, third)

    tokens, q_heads, k_heads = (
        (q.shape[2], q.shape[1], k.shape[1]) if heads_first else (q.shape[1], q.shape[2], k.shape[2])
    )
    half = q.shape[3] // 2
    block_half = next_power_of_2(half)
    block_heads = min(max(1, TILE // block_half), next_power_of_2(max(q_heads, k_heads)))
    launch(
        _rotary_kernel, (q.shape[0] * tokens, cdiv(q_heads, block_heads) + cdiv(k_heads, block_heads)),
        q, k, cos, sin, turned_q, turned_k, tokens, q_heads, k_heads,
        *strides(q), *strides(k), *strides(turned_q), *strides(turned_k), *strides(cos)[:2], *strides(sin)[:2],
        HALF=half, BACKWARD=backward, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half, fp_fusion=False,
    )  # fmt: skip


def _case(head_dim: int, dtype: str, backward: bool) -> Case:
    q, k = (meta(4, 512, heads, head_dim, dtype=dtype).transpose(1, 2) for heads in (32, 8))
    cos = meta(1, 1, 512, head_dim, dtype=dtype)
    return Case(
        kernel="rotary_backward" if backward else "rotary",
        config=f"d{head_dim}-{dtype}",
        call=lambda: (rotary_backward if backward else rotary)(q, k, cos, cos),
        fn=_rotary_kernel,
        values=lambda a: 2 * a.HALF * a.BLOCK_HEADS,
        bytes_per_value=2 * q.element_size(),
        max_instr=13.0,
        max_registers=64,
        min_load_bits=128,
        min_store_bits=128,
    )


_SIZES = ((64, "bf16"), (128, "bf16"), (128, "fp32"))
CASES = [_case(*size, backward) for size in _SIZES for backward in (False, True)]
