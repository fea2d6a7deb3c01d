"""The gradients of an adapter's factors in one launch over a split grid, of one linear or of several that read one x.

    dA = dSᵀ drop(x)          [rank, in], the ranks of all linears stacked
    dBᵢ = dYᵢᵀ Sᵢ             [outᵢ, rankᵢ]

A program takes one tile of columns of x or of a dY and adds over tokens, or over one split of them (low_rank.py).
"""

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import threshold
from kernels.triton.case import DTYPES, Case, meta
from kernels.triton.dropout import keep
from kernels.triton.launch import cdiv, launch, next_power_of_2
from kernels.triton.low_rank import SUM_BLOCK, split_sum, sum_of_splits, three


@triton.jit
def outer_kernel(
    x_ptr,  # [M, K]
    ds_ptr,  # [M, R], rows apart by stride_sm
    da_ptr,  # [R, K], any float dtype; or fp32 [splits, …] as the others: partial sums, all in one workspace
    seed_ptr,  # i64 [], or None: no dropout
    dy0_ptr,  # [M, N0]
    dy1_ptr,  # [M, N1], or None
    dy2_ptr,  # [M, N2], or None
    s0_ptr,  # [M, R0], rows apart by stride_sm
    s1_ptr,
    s2_ptr,
    db0_ptr,  # [N0, R0]
    db1_ptr,
    db2_ptr,
    M,
    M_SPLIT,  # tokens of one split, a multiple of BLOCK_M
    K,
    N0,
    N1,
    N2,
    stride_sm,
    size,  # elements of one split in the workspace
    scale,  # 1 / (1 - p), of dA
    R: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns of x or of a dy
    BLOCK_A: tl.constexpr,  # rows of dA, the ranks of all linears
    BLOCK_B: tl.constexpr,  # columns of a dB
):
    pid = tl.program_id(0)
    split = tl.program_id(1)
    start = split * M_SPLIT
    end = tl.minimum(start + M_SPLIT, M)
    place = split.to(tl.int64) * size
    tiles = tl.cdiv(K, BLOCK_C) * tl.cdiv(R, BLOCK_A)
    if pid < tiles:
        seed = None
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
        k = pid // tl.cdiv(R, BLOCK_A) * BLOCK_C + tl.arange(0, BLOCK_C)
        r = pid % tl.cdiv(R, BLOCK_A) * BLOCK_A + tl.arange(0, BLOCK_A)
        da = transposed_product(
            x_ptr, ds_ptr, seed, 0, k, r, start, end, K, stride_sm, R, THRESHOLD, BLOCK_M, BLOCK_C, BLOCK_A
        )
        da_ptrs = da_ptr + place + r[None, :].to(tl.int64) * K + k[:, None]
        tl.store(da_ptrs, (da * scale).to(da_ptr.dtype.element_ty), mask=(k < K)[:, None] & (r < R)[None, :])
    pid -= tiles
    tiles = tl.cdiv(N0, BLOCK_C) * tl.cdiv(R0, BLOCK_B)
    _b_gradient(dy0_ptr, s0_ptr, db0_ptr + place, pid, tiles, start, end, N0, stride_sm, R0, BLOCK_M, BLOCK_C, BLOCK_B)
    if dy1_ptr is not None:
        pid -= tiles
        tiles = tl.cdiv(N1, BLOCK_C) * tl.cdiv(R1, BLOCK_B)
        _b_gradient(
            dy1_ptr, s1_ptr, db1_ptr + place, pid, tiles, start, end, N1, stride_sm, R1, BLOCK_M, BLOCK_C, BLOCK_B
        )
    if dy2_ptr is not None:
        pid -= tiles
        tiles = tl.cdiv(N2, BLOCK_C) * tl.cdiv(R2, BLOCK_B)
        _b_gradient(
            dy2_ptr, s2_ptr, db2_ptr + place, pid, tiles, start, end, N2, stride_sm, R2, BLOCK_M, BLOCK_C, BLOCK_B
        )


@triton.jit
def _b_gradient(
    dy_ptr, s_ptr, db_ptr, pid, tiles, start, end, N, stride_sm, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The tile `pid` of dB, if it is one of its `tiles`."""
    if (pid >= 0) & (pid < tiles):
        n = pid // tl.cdiv(R, BLOCK_B) * BLOCK_C + tl.arange(0, BLOCK_C)
        r = pid % tl.cdiv(R, BLOCK_B) * BLOCK_B + tl.arange(0, BLOCK_B)
        db = transposed_product(dy_ptr, s_ptr, None, 0, n, r, start, end, N, stride_sm, R, 0, BLOCK_M, BLOCK_C, BLOCK_B)
        db_ptrs = db_ptr + n[:, None].to(tl.int64) * R + r[None, :]
        tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=(n < N)[:, None] & (r < R)[None, :])


@triton.jit
def transposed_product(
    x_ptr, s_ptr, seed, first, c, r, start, end, C, stride_sm, R: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """xᵀ S of columns c of x [M, C] and r of S [M, R], over tokens start to end: fp32 [BLOCK_C, BLOCK_R].

    With a seed, token m has the mask of token m - first.
    """
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for m0 in range(start, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        x = tl.load(x_ptr + m[:, None] * C + c[None, :], mask=(m < end)[:, None] & (c < C)[None, :], other=0.0)
        if seed is not None:
            x = tl.where(keep(seed, (m - first)[:, None], c[None, :], THRESHOLD), x, 0.0)
        s_ptrs = s_ptr + m[:, None] * stride_sm + r[None, :]
        s = tl.load(s_ptrs, mask=(m < end)[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(x.T, s, acc, input_precision="ieee")
    return acc


@triton.jit
def _sum_outputs_kernel(
    partial_ptr,  # fp32 [splits, n + n0 + n1 + n2]
    da_ptr,  # n elements, any float dtype, as the others
    db0_ptr,
    db1_ptr,
    db2_ptr,
    splits,
    n,
    n0,
    n1,
    n2,
    BLOCK: tl.constexpr,
):
    size = n + n0 + n1 + n2
    pid = _sum_one(partial_ptr, da_ptr, tl.program_id(0), n, size, splits, BLOCK)
    pid = _sum_one(partial_ptr + n, db0_ptr, pid, n0, size, splits, BLOCK)
    if db1_ptr is not None:
        pid = _sum_one(partial_ptr + n + n0, db1_ptr, pid, n1, size, splits, BLOCK)
    if db2_ptr is not None:
        _sum_one(partial_ptr + n + n0 + n1, db2_ptr, pid, n2, size, splits, BLOCK)


@triton.jit
def _sum_one(partial_ptr, out_ptr, pid, n, size, splits, BLOCK: tl.constexpr):
    """Finish the part `pid` of an output of n elements, if it has one; the number of `pid` among the other outputs."""
    tiles = tl.cdiv(n, BLOCK)
    if (pid >= 0) & (pid < tiles):
        i = pid * BLOCK + tl.arange(0, BLOCK)
        total = sum_of_splits(partial_ptr + i, size, splits, i < n, BLOCK)
        tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < n)
    return pid - tiles


def outer_tiles(dtype: torch.dtype, ranks: int, rank: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_C": 32, "BLOCK_A": 16, "BLOCK_B": 16, "num_warps": 4, "num_stages": 2}
    block_a, block_b = (min(128, max(16, next_power_of_2(r))) for r in (ranks, rank))
    warps = 8 if block_a > block_b or block_a == 128 else 4  # with four, sm_120 spilled
    return {"BLOCK_M": 64, "BLOCK_C": 64, "BLOCK_A": block_a, "BLOCK_B": block_b, "num_warps": warps, "num_stages": 3}


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
    dA, (dB,) = outers(x, ds, [dy], [s], (dtypes[0], [dtypes[1]]), p, seed)
    return dA, dB


def outers(
    x: Tensor,
    ds: Tensor,
    dys: Sequence[Tensor],
    ss: Sequence[Tensor],
    dtypes: tuple[torch.dtype, Sequence[torch.dtype]],
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """(dA = dsᵀ drop(x) [R, K], dBᵢ = dyᵢᵀ sᵢ [Nᵢ, Rᵢ]) in `dtypes`, of up to MOST_LINEARS dys.

    x [M, K] and each dy [M, Nᵢ] are contiguous; ds [M, R] and each s [M, Rᵢ] are in their rows, which in all of them
    are equally far apart.
    """
    (m, k), ranks, rank = x.shape, ds.shape[1], [s.shape[1] for s in ss]
    tiles = outer_tiles(x.dtype, ranks, max(rank))
    da = torch.empty(ranks, k, dtype=dtypes[0], device=x.device)
    dbs = [torch.empty(dy.shape[1], r, dtype=t, device=x.device) for dy, r, t in zip(dys, rank, dtypes[1])]
    columns = [dy.shape[1] for dy in dys]
    programs = cdiv(k, tiles["BLOCK_C"]) * cdiv(ranks, tiles["BLOCK_A"])
    programs += sum(cdiv(n, tiles["BLOCK_C"]) * cdiv(r, tiles["BLOCK_B"]) for n, r in zip(columns, rank))
    sizes = [da.numel(), *(db.numel() for db in dbs)]
    n_read = m * (k + sum(columns)) * x.element_size()
    of_one, splits = split_sum(m, tiles["BLOCK_M"], programs, n_read, sum(sizes), x.device)
    outs, size = [da, *dbs], 0
    if splits > 1:
        size = sum(sizes)
        partial = torch.empty(splits * size, dtype=torch.float32, device=x.device)
        outs = partial[:size].split(sizes)
    launch(
        outer_kernel, (programs, splits),
        x, ds, outs[0], seed if p else None, *three(dys), *three(ss), *three(outs[1:]),
        m, of_one, k, *three(columns, 0), ss[0].stride(0), size, 1 / (1 - p),
        ranks, *three(rank, 0), THRESHOLD=threshold(p), **tiles, fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        args = (partial, da, *three(dbs), splits, sizes[0], *three(sizes[1:], 0))
        grid = (sum(cdiv(n, SUM_BLOCK) for n in sizes),)
        launch(_sum_outputs_kernel, grid, *args, BLOCK=SUM_BLOCK, fp_fusion=True)
    return da, dbs


def _case(rank: int, p: float = 0.0, dtype: str = "bf16") -> Case:
    """`outer` for a rank."""
    x, s = meta(4096, 4096, dtype=dtype), meta(4096, rank, dtype=dtype)
    dropout = (p, meta(dtype=torch.int64) if p else None)
    return Case(
        kernel="lora_outer",
        config="-".join([f"r{rank}", dtype] + ["dropout"] * bool(p)),
        call=lambda: outer(x, s, x, s, (torch.float32, torch.float32), *dropout),
        fn=outer_kernel,
        values=lambda a: a.BLOCK_M * a.BLOCK_C,
        bytes_per_value=DTYPES[dtype].itemsize,
        flops_per_value=lambda a: 2 * a.BLOCK_B,
        loop=True,
        max_instr=None if dtype == "fp32" else 28.0 if p else 17.0 if rank <= 128 else 22.0,  # as in low_rank.py
        min_load_bits=128,
        mma=dtype != "fp32",
    )


def _joined_case(rank: int) -> Case:
    """`outers` of queries, keys and values."""
    x, ds = meta(4096, 4096, dtype="bf16"), meta(4096, 3 * rank, dtype="bf16")
    dys, ss = [meta(4096, n, dtype="bf16") for n in (4096, 1024, 1024)], ds.split(rank, 1)
    return dataclasses.replace(
        _case(rank),
        config=f"r{rank}-bf16-joined",
        call=lambda: outers(x, ds, dys, ss, (torch.float32, [torch.float32] * 3)),
        flops_per_value=lambda a: 2 * a.BLOCK_A,
    )


def _sum_case() -> Case:
    """The second launch."""
    x, s = meta(2048, 4096, dtype="bf16"), meta(2048, 16, dtype="bf16")
    dys = [meta(2048, 1024, dtype="bf16")] * 3
    return Case(
        kernel="lora_sum",
        config="outer",
        call=lambda: outers(x, s, dys, [s] * 3, (torch.float32, [torch.float32] * 3)),
        fn=_sum_outputs_kernel,
        values=lambda a: a.BLOCK,
        bytes_per_value=4.0,
        loop=True,
        max_instr=10.0,
        min_load_bits=128,
    )


CASES = [
    *[_case(rank) for rank in (16, 64, 512)],
    *[_joined_case(rank) for rank in (16, 64)],
    *[_case(64, 0.1, dtype) for dtype in ("bf16", "fp32")],
    _sum_case(),
]
