"""Rows of tokens sorted by expert, and back, in Triton: see kernels/routing.py.

Launches: gather 1, combine 2, its backward 2; the first of two turns `order` round. Rows of y are read where they lie,
so no copy in the order of the pairs is made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.case import DTYPES, Case, meta
from kernels.triton.launch import cdiv, launch

BLOCK = 1024
BLOCK_T, BLOCK_H = 4, 512  # a row's part is 1 KiB in 16 bits, so its place in memory costs little


@triton.jit
def _invert_kernel(
    order_ptr,  # i64 [n], a permutation
    rows_ptr,  # i32 [n]
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(order_ptr + i, mask=i < n, other=0)
    tl.store(rows_ptr + pair, i, mask=i < n)


@triton.jit
def _gather_kernel(
    x_ptr,  # [T, H]
    order_ptr,  # i64 [T · K]
    y_ptr,  # [T · K, H]
    n,  # T · K
    H,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (i < n)[:, None] & (h < H)[None, :]
    t = tl.load(order_ptr + i, mask=i < n, other=0) // K
    x = tl.load(x_ptr + t[:, None] * H + h[None, :], mask=inside, other=0.0)
    tl.store(y_ptr + i[:, None] * H + h[None, :], x, mask=inside)


@triton.jit
def _combine_kernel(
    y_ptr,  # [T · K, H]
    rows_ptr,  # i32 [T, K]
    weights_ptr,  # [T, K], any float dtype, or None: all are 1
    out_ptr,  # [T, H]
    T,
    H,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (t < T)[:, None] & (h < H)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for j in range(K):
        row = tl.load(rows_ptr + t * K + j, mask=t < T, other=0).to(tl.int64)
        y = tl.load(y_ptr + row[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + t * K + j, mask=t < T, other=0.0).to(tl.float32)[:, None]
        total += y
    tl.store(out_ptr + t[:, None] * H + h[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine_backward_kernel(
    dout_ptr,  # [T, H]
    y_ptr,  # [T · K, H]
    rows_ptr,  # i32 [T, K]
    weights_ptr,  # [T, K], any float dtype
    dy_ptr,  # [T · K, H]
    dweights_ptr,  # [T, K]
    H,
    K,
    BLOCK_H: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + pair).to(tl.int64)
    weight = tl.load(weights_ptr + pair).to(tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        dout = tl.load(dout_ptr + pair // K * H + h, mask=h < H, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
        tl.store(dy_ptr + row * H + h, (dout * weight).to(dy_ptr.dtype.element_ty), mask=h < H)
        total += dout * y
    tl.store(dweights_ptr + pair, tl.sum(total, 0).to(dweights_ptr.dtype.element_ty))


def _rows_of_pairs(order: Tensor) -> Tensor:
    """The sorted row of each pair, int32: the inverse of `order`."""
    rows = torch.empty(len(order), dtype=torch.int32, device=order.device)
    launch(_invert_kernel, (cdiv(len(order), BLOCK),), order, rows, len(order), BLOCK=BLOCK, fp_fusion=False)
    return rows


def gather(x: Tensor, order: Tensor, k: int) -> Tensor:
    n, size = len(order), x.shape[1]
    y = torch.empty(n, size, dtype=x.dtype, device=x.device)
    grid = (cdiv(n, BLOCK_T), cdiv(size, BLOCK_H))
    args = (x.contiguous(), order.contiguous(), y, n, size, k)
    launch(_gather_kernel, grid, *args, BLOCK_T=BLOCK_T, BLOCK_H=BLOCK_H, fp_fusion=False)
    return y


def combine(y: Tensor, order: Tensor, weights: Tensor | None, k: int) -> Tensor:
    tokens, size = len(y) // k, y.shape[1]
    out = torch.empty(tokens, size, dtype=y.dtype, device=y.device)
    grid = (cdiv(tokens, BLOCK_T), cdiv(size, BLOCK_H))
    weights = None if weights is None else weights.contiguous()
    args = (y, _rows_of_pairs(order.contiguous()), weights, out, tokens, size, k)
    launch(_combine_kernel, grid, *args, BLOCK_T=BLOCK_T, BLOCK_H=BLOCK_H, fp_fusion=True)
    return out


def combine_backward(dout: Tensor, y: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    size, k = y.shape[1], weights.shape[1]
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=y.device)
    args = (dout, y, _rows_of_pairs(order.contiguous()), weights.contiguous(), dy, dweights, size, k)
    launch(_combine_backward_kernel, (len(y),), *args, BLOCK_H=BLOCK, fp_fusion=True)
    return dy, dweights


def _case(backward: bool, dtype: str, weighted: bool = True) -> Case:
    """4096 tokens with 8 experts each."""
    y, dout, weights = meta(32768, 2048, dtype=dtype), meta(4096, 2048, dtype=dtype), meta(4096, 8)
    order, size = meta(32768, dtype=torch.int64), DTYPES[dtype].itemsize

    def call() -> None:
        if backward:
            combine_backward(dout, y, order, weights)
        else:
            combine(y, order, weights if weighted else None, 8)

    return Case(
        kernel="combine_backward" if backward else "combine",
        config=dtype + ("" if weighted else "-sum"),
        call=call,
        fn=_combine_backward_kernel if backward else _combine_kernel,
        values=(lambda a: a.BLOCK_H) if backward else (lambda a: a.BLOCK_T * a.BLOCK_H),  # of y
        bytes_per_value=size * ((2 + 1 / 8) if backward else (1 + 1 / 8)),
        loop=True,
        launches=2,
        min_load_bits=128,
        min_store_bits=128,
    )


CASES = [
    *[_case(backward, dtype) for backward in (False, True) for dtype in ("bf16", "fp32")],
    _case(False, "bf16", weighted=False),
    Case(
        kernel="gather",
        config="bf16",
        call=lambda: gather(meta(4096, 2048, dtype="bf16"), meta(32768, dtype=torch.int64), 8),
        fn=_gather_kernel,
        values=BLOCK_T * BLOCK_H,  # of y
        bytes_per_value=2 * (1 + 1 / 8),
        min_load_bits=128,
        min_store_bits=128,
    ),
]
