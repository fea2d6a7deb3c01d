"""Dropout in Triton: the mask of kernels/dropout.py for other kernels, and a kernel that only drops."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import threshold
from kernels.triton.case import Case, meta
from kernels.triton.launch import cdiv, launch

_TILE = {"BLOCK_ROWS": 16, "BLOCK_COLS": 256}


@triton.jit
def _mix_bits(h):  # uint32, any shape
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keep(seed, rows, cols, THRESHOLD: tl.constexpr):
    """The mask at broadcastable `rows` and `cols`, as the reference's `keep_mask` makes it; `seed` is any integer."""
    row = _mix_bits(rows.to(tl.uint32) ^ _mix_bits(seed.to(tl.uint32)))
    return _mix_bits(_mix_bits(cols.to(tl.uint32)) ^ row) >= THRESHOLD


@triton.jit
def _dropout_kernel(
    x_ptr,  # [rows, cols]
    seed_ptr,  # i64 []
    y_ptr,  # [rows, cols]
    rows,
    cols,
    scale,  # 1 / (1 - p)
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    col = (tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    inside = (row < rows) & (col < cols)
    x = tl.load(x_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_COLS]
    x = tl.where(keep(tl.load(seed_ptr), row, col, THRESHOLD), x * scale, 0.0)
    tl.store(y_ptr + row * cols + col, x.to(y_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x [rows, cols], contiguous, with dropped elements zero and the others divided by 1 - p."""
    rows, cols = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (cdiv(rows, _TILE["BLOCK_ROWS"]), cdiv(cols, _TILE["BLOCK_COLS"]))
    args = (x, seed, y, rows, cols, 1 / (1 - p))
    launch(_dropout_kernel, grid, *args, THRESHOLD=threshold(p), **_TILE, fp_fusion=False)
    return y


CASES = [
    Case(
        kernel="dropout",
        config="bf16",
        call=lambda: dropout(meta(4096, 4096, dtype="bf16"), 0.1, meta(dtype=torch.int64)),
        fn=_dropout_kernel,
        values=lambda a: a.BLOCK_ROWS * a.BLOCK_COLS,
        bytes_per_value=4.0,
        min_load_bits=128,
        min_store_bits=128,
    )
]
