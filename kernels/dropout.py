"""Dropout whose mask is a function of a seed, so that backward makes it again instead of storing it.

    keep[t, k] = mix(mix(k) ^ mix(t ^ mix(seed))) >= p · 2³²

`mix` is a 32-bit integer hash (two multiply-xorshift rounds, the constants found by Ellis Wellons' "hash prospector"
search for low bias). The same three lines run in torch and in Triton, so both backends drop the same elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grid import cdiv
from kernels.spec import KernelSpec

_MASK32 = 0xFFFFFFFF
_TILE = {"BLOCK_ROWS": 16, "BLOCK_COLS": 256}


def new_seed(device: torch.device) -> Tensor:
    """A random int64 [] in [0, 2³²) from torch's generator, so that `torch.manual_seed` decides it."""
    return torch.randint(_MASK32, (), device=device)


def threshold(p: float) -> int:
    """Hashes below it are dropped."""
    return int(p * 2**32)


def _mix(h: Tensor) -> Tensor:
    """32-bit hash of int64 values in [0, 2³²)."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK32
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)


def keep_mask(rows: int, cols: int, p: float, seed: Tensor) -> Tensor:
    """bool [rows, cols], True with probability 1 - p."""
    row = _mix(torch.arange(rows, device=seed.device) ^ _mix(seed))
    col = _mix(torch.arange(cols, device=seed.device))
    return _mix(col ^ row.unsqueeze(1)) >= threshold(p)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x [rows, cols] with dropped elements zero and the others divided by 1 - p."""
    if p == 0.0:
        return x
    return torch.where(keep_mask(*x.shape, p, seed), x * (1 / (1 - p)), 0)


@triton.jit
def _mix_bits(h):  # uint32, any shape
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keep(seed_ptr, rows, cols, THRESHOLD: tl.constexpr):
    """The mask at broadcastable `rows` and `cols`, as `keep_mask` makes it."""
    row = _mix_bits(rows.to(tl.uint32) ^ _mix_bits(tl.load(seed_ptr).to(tl.uint32)))
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
    x = tl.where(keep(seed_ptr, row, col, THRESHOLD), x * scale, 0.0)
    tl.store(y_ptr + row * cols + col, x.to(y_ptr.dtype.element_ty), mask=inside)


def launch_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`dropout` by the kernel; x is contiguous."""
    rows, cols = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows:
        with torch.cuda.device_of(x):
            _dropout_kernel[(cdiv(rows, _TILE["BLOCK_ROWS"]), cdiv(cols, _TILE["BLOCK_COLS"]))](
                x, seed, y, rows, cols, 1 / (1 - p), THRESHOLD=threshold(p), **_TILE, enable_fp_fusion=False
            )
    return y


AOT_SPECS = [
    KernelSpec(
        kernel="dropout",
        config="bf16",
        fn=_dropout_kernel,
        signature={
            **{"x_ptr": "*bf16", "seed_ptr": "*i64", "y_ptr": "*bf16"},
            **{"rows": "i32", "cols": "i32", "scale": "fp32"},
        },
        constexprs={"THRESHOLD": threshold(0.1), **_TILE},
        values=_TILE["BLOCK_ROWS"] * _TILE["BLOCK_COLS"],
        bytes_per_value=4.0,
        divisible=("cols",),
        min_load_bits=128,
        min_store_bits=128,
    )
]
