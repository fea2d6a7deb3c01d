"""The thin products of an adapter: those that have its rank for one of their sizes.

    project    S = s·drop(x)Aᵀ, dS = s·dY B         [tokens, rank]
    outer      dA = dSᵀ drop(x), dB = dYᵀ S         [rank, in], [out, rank], in one launch over a split grid

Both read their big operand once and are bound by that. `outer` walks all tokens in each program: no atomics and no
partial sums, so that two runs give the same bits. The dropout mask is made again where it is needed, never stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import threshold
from kernels.triton.case import DTYPES, Case, meta
from kernels.triton.dropout import keep
from kernels.triton.launch import cdiv, launch, next_power_of_2


@triton.jit
def project_kernel(
    x_ptr,  # [M, K]
    v_ptr,  # [K, R], any strides, any float dtype
    seed_ptr,  # i64 [], or None: no dropout
    s_ptr,  # [M, R] in x's dtype
    M,
    K,
    stride_vk,
    stride_vr,
    scale,  # s / (1 - p)
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        if seed_ptr is not None:
            x = tl.where(keep(seed_ptr, m[:, None], k[None, :], THRESHOLD), x, 0.0)
        v_ptrs = v_ptr + k[:, None].to(tl.int64) * stride_vk + r[None, :] * stride_vr
        v = tl.load(v_ptrs, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, v.to(x_ptr.dtype.element_ty), acc, input_precision="ieee")
    s = (acc * scale).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + m[:, None] * R + r[None, :], s, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def outer_kernel(
    x_ptr,  # [M, K]
    ds_ptr,  # [M, R]
    dy_ptr,  # [M, N]
    s_ptr,  # [M, R]
    seed_ptr,  # i64 [], or None: no dropout
    da_ptr,  # [R, K]
    db_ptr,  # [N, R]
    M,
    K,
    N,
    scale,  # 1 / (1 - p)
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns of x or of dy
    BLOCK_R: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(K, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if pid < tiles_k:
        k = pid * BLOCK_C + tl.arange(0, BLOCK_C)
        da = _transposed_product(x_ptr, ds_ptr, seed_ptr, k, r, M, K, R, THRESHOLD, BLOCK_M, BLOCK_C, BLOCK_R) * scale
        da_ptrs = da_ptr + r[None, :].to(tl.int64) * K + k[:, None]
        tl.store(da_ptrs, da.to(da_ptr.dtype.element_ty), mask=(k < K)[:, None] & (r < R)[None, :])
    else:
        n = (pid - tiles_k) * BLOCK_C + tl.arange(0, BLOCK_C)
        db = _transposed_product(dy_ptr, s_ptr, None, n, r, M, N, R, THRESHOLD, BLOCK_M, BLOCK_C, BLOCK_R)
        db_ptrs = db_ptr + n[:, None].to(tl.int64) * R + r[None, :]
        tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=(n < N)[:, None] & (r < R)[None, :])


@triton.jit
def _transposed_product(
    x_ptr, s_ptr, seed_ptr, c, r, M, C, R: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """xᵀ S of columns c of x [M, C] and r of S [M, R]: fp32 [BLOCK_C, BLOCK_R]."""
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        x = tl.load(x_ptr + m[:, None] * C + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
        if seed_ptr is not None:
            x = tl.where(keep(seed_ptr, m[:, None], c[None, :], THRESHOLD), x, 0.0)
        s = tl.load(s_ptr + m[:, None] * R + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(x.T, s, acc, input_precision="ieee")
    return acc


def _project_tiles(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Tile sizes, warps and stages. Every choice fits 64 KiB of shared memory and 255 registers (see CASES)."""
    if dtype == torch.float32:  # no matrix units
        return {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2}
    block_r = min(128, max(16, next_power_of_2(rank)))
    return {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 2 if block_r > 64 else 3}


def _outer_tiles(dtype: torch.dtype, rank: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_C": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2}
    block_r = min(128, max(16, next_power_of_2(rank)))
    return {"BLOCK_M": 64, "BLOCK_C": 64, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 3}


def project(
    x: Tensor,
    v: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """scale · drop(x) v in x's dtype [M, R]; x [M, K] contiguous, v [K, R] of any strides."""
    m, rank = x.shape[0], v.shape[1]
    tiles = _project_tiles(x.dtype, rank)
    s = torch.empty(m, rank, dtype=x.dtype, device=x.device)
    grid = (cdiv(m, tiles["BLOCK_M"]), cdiv(rank, tiles["BLOCK_R"]))
    args = (x, v, seed if p else None, s, m, x.shape[1], *v.stride(), scale / (1 - p))
    launch(project_kernel, grid, *args, R=rank, THRESHOLD=threshold(p), **tiles, fp_fusion=True)
    return s


def outer(
    x: Tensor,
    ds: Tensor,
    dy: Tensor,
    s: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dA = dsᵀ drop(x) [R, K], dB = dyᵀ s [N, R]) in `dtypes`; all operands contiguous."""
    (m, k), n, rank = x.shape, dy.shape[1], s.shape[1]
    tiles = _outer_tiles(x.dtype, rank)
    da = torch.empty(rank, k, dtype=dtypes[0], device=x.device)
    db = torch.empty(n, rank, dtype=dtypes[1], device=x.device)
    grid = (cdiv(k, tiles["BLOCK_C"]) + cdiv(n, tiles["BLOCK_C"]), cdiv(rank, tiles["BLOCK_R"]))
    args = (x, ds, dy, s, seed if p else None, da, db, m, k, n, 1 / (1 - p))
    launch(outer_kernel, grid, *args, R=rank, THRESHOLD=threshold(p), **tiles, fp_fusion=True)
    return da, db


def _case(kernel: str, rank: int, backward: bool = False, p: float = 0.0, dtype: str = "bf16") -> Case:
    """`project` (of x, or of dY in backward) or `outer` for a rank."""
    x, s = meta(4096, 4096, dtype=dtype), meta(4096, rank, dtype=dtype)
    dropout = (p, meta(dtype=torch.int64) if p else None)
    if kernel == "project":
        v = meta(4096, rank) if backward else meta(rank, 4096).t()
        fn, call = project_kernel, lambda: project(x, v, 2.0, *dropout)
    else:
        fn, call = outer_kernel, lambda: outer(x, s, x, s, (torch.float32, torch.float32), *dropout)
    return Case(
        kernel=f"lora_{kernel}",
        config="-".join([f"r{rank}", dtype] + ["backward"] * backward + ["dropout"] * bool(p)),
        call=call,
        fn=fn,
        values=lambda a: a.BLOCK_M * (a.BLOCK_K if kernel == "project" else a.BLOCK_C),
        bytes_per_value=DTYPES[dtype].itemsize,
        flops_per_value=lambda a: 2 * a.BLOCK_R,
        loop=True,
        # An H100 reads 2-byte elements at the rate of 17 instructions an element: beyond, memory is not the bound.
        # The hash of dropout takes about 14 of them.
        max_instr=None if dtype == "fp32" else 28.0 if p else 17.0 if rank <= 128 else 22.0,
        min_load_bits=128,
        mma=dtype != "fp32",
    )


CASES = [
    *[_case("project", rank, backward) for rank in (16, 64, 512) for backward in (False, True)],
    *[_case("outer", rank) for rank in (16, 64, 512)],
    *[_case(kernel, 64, p=0.1, dtype=dtype) for dtype in ("bf16", "fp32") for kernel in ("project", "outer")],
]
