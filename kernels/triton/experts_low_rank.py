"""The thin products of the adapters of all experts, whose rows are sorted by expert: one launch for all of them.

    S = s·drop(x)A_eᵀ, dS = s·dY B_e     [rows, rank]
    dA_e = dS_eᵀ drop(x_e)               [E, rank, in]
    dB_e = dY_eᵀ S_e                     [E, out, rank]

A program of the first two makes a tile of rows of one expert (grouped.py). A program of the gradients takes one tile of
columns of x or of dY and adds over the rows of one expert, in their order: no atomics, no second launch. Many experts
make programs enough for a GPU, so sums are not split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import threshold
from kernels.triton.case import DTYPES, Case, meta
from kernels.triton.dropout import keep
from kernels.triton.grouped import rows_of_tile, tiles_of_rows
from kernels.triton.launch import cdiv, launch, next_power_of_2
from kernels.triton.low_rank import project_tiles, projected
from kernels.triton.outer import outer_tiles, transposed_product

DROP_ROWS, DROP_COLUMNS = 16, 256


@triton.jit(do_not_specialize=["begin"])
def _project_kernel(
    x_ptr,  # [M, K]
    v_ptr,  # [E, K, R], any strides, any float dtype
    seed_ptr,  # i64 [], or None: no dropout
    ends_ptr,  # i32 [E]
    s_ptr,  # [M, R] in x's dtype
    M,
    K,
    begin,  # the first expert of this launch
    experts,  # of this launch
    total,  # E
    stride_ve,
    stride_vk,
    stride_vr,
    scale,  # s / (1 - p)
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    expert, first, row, end = rows_of_tile(
        ends_ptr, tl.program_id(0), M, begin, experts, total, BLOCK_M, EXPERTS
    )  # fmt: skip
    e = begin + tl.minimum(expert, experts - 1).to(tl.int64)
    m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr) + e
    columns = tl.where((row < end) & (expert < experts), K, 0)  # rows of nobody become 0
    v_ptr += e * stride_ve
    acc = projected(
        x_ptr, v_ptr, seed, m, first, r, end, K, 0, columns, stride_vk, stride_vr, R,
        THRESHOLD, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    inside = (m < end)[:, None] & (r < R)[None, :]
    tl.store(s_ptr + m[:, None] * R + r[None, :], (acc * scale).to(s_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _outer_kernel(
    x_ptr,  # [M, K]
    ds_ptr,  # [M, R]
    dy_ptr,  # [M, N]
    s_ptr,  # [M, R]
    seed_ptr,  # i64 [], or None: no dropout
    ends_ptr,  # i32 [E]
    da_ptr,  # [E, R, K], any float dtype
    db_ptr,  # [E, N, R], any float dtype
    M,
    K,
    N,
    scale,  # 1 / (1 - p), of dA
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns of x or of dy
    BLOCK_R: tl.constexpr,
):
    pid = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    end = tl.minimum(tl.load(ends_ptr + expert), M)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    r = pid % tl.cdiv(R, BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = pid // tl.cdiv(R, BLOCK_R) * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(K, BLOCK_C)
    if pid < tiles * tl.cdiv(R, BLOCK_R):
        seed = None
        if seed_ptr is not None:
            seed = tl.load(seed_ptr) + expert
        da = transposed_product(
            x_ptr, ds_ptr, seed, start, c, r, start, end, K, R, R, THRESHOLD, BLOCK_M, BLOCK_C, BLOCK_R
        )
        da_ptrs = da_ptr + (expert * R + r[None, :]) * K + c[:, None]
        tl.store(da_ptrs, (da * scale).to(da_ptr.dtype.element_ty), mask=(c < K)[:, None] & (r < R)[None, :])
    else:
        n = c - tiles * BLOCK_C
        db = transposed_product(dy_ptr, s_ptr, None, 0, n, r, start, end, N, R, R, 0, BLOCK_M, BLOCK_C, BLOCK_R)
        db_ptrs = db_ptr + (expert * N + n[:, None]) * R + r[None, :]
        tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=(n < N)[:, None] & (r < R)[None, :])


@triton.jit
def _dropout_kernel(
    x_ptr,  # [M, K]
    seed_ptr,  # i64 []
    ends_ptr,  # i32 [E]
    y_ptr,  # [M, K]
    M,
    K,
    experts,
    scale,  # 1 / (1 - p)
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    i = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + i, mask=i < experts, other=2147483647)
    before = ends[None, :] <= m[:, None]  # [BLOCK_M, EXPERTS]: the experts whose rows come before row m
    expert = tl.sum(before.to(tl.int32), 1)
    first = tl.max(tl.where(before, ends[None, :], 0), 1)
    inside = (m < M)[:, None] & (k < K)
    places = m.to(tl.int64)[:, None] * K + k
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    kept = keep((tl.load(seed_ptr) + expert)[:, None], (m - first)[:, None], k, THRESHOLD)
    tl.store(y_ptr + places, tl.where(kept, x * scale, 0.0).to(y_ptr.dtype.element_ty), mask=inside)


def project(
    x: Tensor,
    ends: Tensor,
    v: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    part: tuple[int, int] | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """scale · drop(x) v_e [M, R] in x's dtype, 0 in rows that belong to nobody; x is contiguous, v [E, K, R] any.

    With `part`, (first expert, experts), only the rows of these are written, `into` the result for the experts before.
    """
    (m, k), rank, total = x.shape, v.shape[2], len(ends)
    s = torch.empty(m, rank, dtype=x.dtype, device=x.device) if into is None else into
    begin, experts = part or (0, total)
    tiles = project_tiles(x.dtype, rank)
    of_rows, block_e = tiles_of_rows(experts, m, tiles["BLOCK_M"])
    args = (x, v, seed if p else None, ends, s, m, k, begin, experts, total, *v.stride(), scale / (1 - p))
    grid = (of_rows, cdiv(rank, tiles["BLOCK_R"]))
    launch(_project_kernel, grid, *args, R=rank, THRESHOLD=threshold(p), **tiles, **block_e, fp_fusion=True)
    return s


def outer(
    x: Tensor,
    ds: Tensor,
    dy: Tensor,
    s: Tensor,
    ends: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dA [E, R, K] = ds_eᵀ drop(x_e), dB [E, N, R] = dy_eᵀ s_e) in `dtypes`; all operands contiguous."""
    (m, k), n, rank, experts = x.shape, dy.shape[1], s.shape[1], len(ends)
    da = torch.empty(experts, rank, k, dtype=dtypes[0], device=x.device)
    db = torch.empty(experts, n, rank, dtype=dtypes[1], device=x.device)
    tiles = outer_tiles(x.dtype, rank, rank)
    tiles["BLOCK_R"] = tiles.pop("BLOCK_A")
    del tiles["BLOCK_B"]
    columns = cdiv(k, tiles["BLOCK_C"]) + cdiv(n, tiles["BLOCK_C"])
    args = (x, ds, dy, s, seed if p else None, ends, da, db, m, k, n, 1 / (1 - p))
    grid = (columns * cdiv(rank, tiles["BLOCK_R"]), experts)
    launch(_outer_kernel, grid, *args, R=rank, THRESHOLD=threshold(p), **tiles, fp_fusion=True)
    return da, db


def dropout(x: Tensor, ends: Tensor, p: float, seed: Tensor) -> Tensor:
    """x [M, K], contiguous, with the elements that each expert drops zero and the others divided by 1 - p."""
    m, k = x.shape
    y = torch.empty(m, k, dtype=x.dtype, device=x.device)
    grid = (cdiv(m, DROP_ROWS), cdiv(k, DROP_COLUMNS))
    sizes = {"BLOCK_M": DROP_ROWS, "BLOCK_K": DROP_COLUMNS, "EXPERTS": next_power_of_2(len(ends))}
    args = (x, seed, ends, y, m, k, len(ends), 1 / (1 - p))
    launch(_dropout_kernel, grid, *args, THRESHOLD=threshold(p), **sizes, fp_fusion=False)
    return y


def _project_case(rank: int, backward: bool = False, p: float = 0.0, dtype: str = "bf16") -> Case:
    """`project` of x, or of dY in backward, of 128 experts 2048 → 768."""
    x, v = (768, meta(128, 768, rank)) if backward else (2048, meta(128, rank, 2048).mT)
    ends = meta(128, dtype=torch.int32)
    return Case(
        kernel="experts_project",
        config="-".join([f"r{rank}", dtype] + ["backward"] * backward + ["dropout"] * bool(p)),
        call=lambda: project(meta(32768, x, dtype=dtype), ends, v, 2.0, p, meta(dtype=torch.int64) if p else None),
        fn=_project_kernel,
        values=lambda a: a.BLOCK_M * a.BLOCK_K,
        bytes_per_value=DTYPES[dtype].itemsize,
        flops_per_value=lambda a: 2 * a.BLOCK_R,
        loop=True,
        max_instr=None if dtype == "fp32" else 28.0 if p else 17.0,  # as in low_rank.py
        min_load_bits=128,
        mma=dtype != "fp32",
    )


def _outer_case(rank: int, p: float = 0.0, dtype: str = "bf16") -> Case:
    x, dy, s = (meta(32768, n, dtype=dtype) for n in (2048, 768, rank))
    seed = meta(dtype=torch.int64) if p else None
    return Case(
        kernel="experts_outer",
        config="-".join([f"r{rank}", dtype] + ["dropout"] * bool(p)),
        call=lambda: outer(x, s, dy, s, meta(128, dtype=torch.int32), (torch.float32, torch.float32), p, seed),
        fn=_outer_kernel,
        values=lambda a: a.BLOCK_M * a.BLOCK_C,
        bytes_per_value=DTYPES[dtype].itemsize,
        flops_per_value=lambda a: 2 * a.BLOCK_R,
        loop=True,
        max_instr=None if dtype == "fp32" else 28.0 if p else 17.0,  # as in low_rank.py
        min_load_bits=128,
        mma=dtype != "fp32",
    )


CASES = [
    *[_project_case(rank, backward) for rank in (16, 64) for backward in (False, True)],
    *[_project_case(16, p=0.1, dtype=dtype) for dtype in ("bf16", "fp32")],
    *[_outer_case(rank) for rank in (16, 64)],
    *[_outer_case(16, 0.1, dtype) for dtype in ("bf16", "fp32")],
    Case(
        kernel="experts_dropout",
        config="bf16",
        call=lambda: dropout(
            meta(32768, 2048, dtype="bf16"), meta(128, dtype=torch.int32), 0.1, meta(dtype=torch.int64)
        ),
        fn=_dropout_kernel,
        values=DROP_ROWS * DROP_COLUMNS,
        bytes_per_value=4.0,
        min_load_bits=128,
        min_store_bits=128,
    ),
]
