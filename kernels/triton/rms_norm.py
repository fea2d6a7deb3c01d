"""RMSNorm in Triton: see kernels/rms_norm.py.

Forward is a program for each row, which it reads twice, the second time from the cache. Backward is a few hundred
programs that walk over rows: each adds up its part of dw, and the parts are summed in a fixed order, so that two runs
give the same bits. Where w is frozen no part is made.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.op import supports_if
from kernels.triton.case import Case, meta
from kernels.triton.launch import launch, next_power_of_2

BLOCK = 4096  # columns at once, at most: 16 bytes a thread and load of bf16 at 8 warps
PROGRAMS = 512  # of backward: a few for each multiprocessor, and parts of dw that take little memory


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [rows, N]
    residual_ptr,  # [rows, N], or None: h is x
    weight_ptr,  # [N], any float dtype
    y_ptr,  # [rows, N]
    h_ptr,  # [rows, N] = x + residual, or None
    r_ptr,  # fp32 [rows]
    N,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * N
    total = tl.zeros([BLOCK], tl.float32)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        h = _sum_of(x_ptr + n, residual_ptr, row * N + n, n < N)
        if h_ptr is not None:
            tl.store(h_ptr + row * N + n, h, mask=n < N)
        total += h.to(tl.float32) * h.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(total, 0) / N + eps)
    tl.store(r_ptr + row, r)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        h = _sum_of(x_ptr + n, residual_ptr, row * N + n, n < N)
        w = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        normed = (h.to(tl.float32) * r).to(h.dtype).to(tl.float32)  # rounded where transformers rounds
        tl.store(y_ptr + row * N + n, (w * normed).to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _sum_of(x_ptrs, residual_ptr, place, mask):
    """x, or x + residual, rounded to x's dtype; the residual's elements are at `place`."""
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + place, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,  # [rows, N]
    dh_ptr,  # [rows, N]: added to dx; or None
    x_ptr,  # [rows, N]
    weight_ptr,  # [N], any float dtype
    r_ptr,  # fp32 [rows]
    dx_ptr,  # [rows, N]
    dweight_ptr,  # fp32 [programs, N] of zeros, or None: w is frozen
    rows,
    N,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if dweight_ptr is not None:
        dweight_ptr += program * N
    for i in range(tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        row = program + i * tl.num_programs(0)
        start = row * N
        r = tl.load(r_ptr + row)
        total = tl.zeros([BLOCK], tl.float32)
        for n0 in range(0, N, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + start + n, mask=n < N, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + start + n, mask=n < N, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            total += dy * w * x
        along = tl.sum(total, 0) / N * r * r * r
        for n0 in range(0, N, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + start + n, mask=n < N, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + start + n, mask=n < N, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            dx = dy * w * r - x * along
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + start + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(dx_ptr + start + n, dx.to(dx_ptr.dtype.element_ty), mask=n < N)
            if dweight_ptr is not None:
                part = tl.load(dweight_ptr + n, mask=n < N, other=0.0)
                tl.store(dweight_ptr + n, part + dy * x * r, mask=n < N)


def _tiles(n: int, dweight: bool = False) -> dict[str, int]:
    block = min(BLOCK // 2 if dweight else BLOCK, next_power_of_2(n))
    values = 256 if dweight else 512  # a warp's: dw takes registers, which spilled with more
    return {"BLOCK": block, "num_warps": max(1, min(8, block // values))}


@supports_if(lambda x, *_: x.dtype != torch.float64)  # the sums here are fp32
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, r = _forward(x, None, weight, eps)
    return y, r


@supports_if(lambda x, *_: x.dtype != torch.float64)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, weight, eps)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, h or None, r)"""
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    h = None if residual is None else torch.empty_like(x)
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    n = x.shape[-1]
    args = (x, residual, weight, y, h, r, n, eps)
    launch(_rms_norm_kernel, (r.numel(),), *args, **_tiles(n), fp_fusion=True)
    return y, h, r


@supports_if(lambda dy, *_: dy.dtype != torch.float64)  # the sums here are fp32
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool) -> tuple[Tensor, Tensor]:
    return _backward(dy, None, x, weight, r, needs_dweight)


@supports_if(lambda dy, *_: dy.dtype != torch.float64)
def add_rms_norm_backward(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    return _backward(dy, dh, h, weight, r, needs_dweight)


def _backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    rows, n = r.numel(), x.shape[-1]
    dx = torch.empty_like(x)
    programs = min(rows, PROGRAMS)
    parts = torch.zeros(programs, n, dtype=torch.float32, device=x.device) if needs_dweight else None
    args = (dy, dh, x, weight, r, dx, parts, rows, n)
    launch(_rms_norm_backward_kernel, (programs,), *args, **_tiles(n, needs_dweight), fp_fusion=True)
    return dx, weight.new_empty(0) if parts is None else parts.sum(0).to(weight.dtype)


def _case(n: int, dtype: str, backward: bool, dweight: bool = False) -> Case:
    rows = 4096
    x, weight, r = meta(rows, n, dtype=dtype), meta(n, dtype=dtype), meta(rows, 1)
    size = x.element_size()
    return Case(
        kernel="rms_norm_backward" if backward else "rms_norm",
        config=f"n{n}-{dtype}" + ("-dw" if dweight else ""),
        call=lambda: rms_norm_backward(x, x, weight, r, dweight) if backward else rms_norm(x, weight, 1e-6),
        fn=_rms_norm_backward_kernel if backward else _rms_norm_kernel,
        values=lambda a: a.BLOCK,
        bytes_per_value=(3 if backward else 2) * size,
        loop=backward,
        max_instr=17.0 if dweight else 12.5,
        max_registers=80,
        min_load_bits=128,
        min_store_bits=128,
    )


def _sum_case(backward: bool) -> Case:
    """Of x + residual."""
    x, weight, r = meta(4096, 4096, dtype="bf16"), meta(4096, dtype="bf16"), meta(4096, 1)
    return dataclasses.replace(
        _case(4096, "bf16", backward),
        config="n4096-bf16-sum",
        call=lambda: add_rms_norm_backward(x, x, x, weight, r, False) if backward else add_rms_norm(x, x, weight, 1e-6),
        bytes_per_value=8.0,
        max_instr=15.5 if backward else 22.5,
    )


CASES = [
    *[_sum_case(backward) for backward in (False, True)],
    *[_case(n, dtype, backward) for n in (576, 4096, 8192) for dtype in ("bf16", "fp32") for backward in (False, True)],
    _case(4096, "bf16", backward=True, dweight=True),
]
