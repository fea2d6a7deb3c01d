"""The thin product of an adapter, and how the sums of all thin products are split.

    S = s·drop(x)Aᵀ, dS = s·dY B         [tokens, rank]
    [dS₁ … dSₙ], dSᵢ = dYᵢ Bᵢ            of linears that read one input, in one launch

It is bound by reading its big operand, which it reads once for up to BLOCK_R ranks. Backward so reads dY for dS, for dB
(outer.py) and for dX. The dropout mask is made again where it is needed, never stored.

A thin product of few tokens, or of few columns, is too few tiles for a GPU. Then the sum that each tile takes, over
columns here and over tokens in outer.py, is split: programs write fp32 partial sums to a workspace, and a second launch
adds them in a fixed order. There are no atomics, so that two runs on one card give the same bits.
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
from kernels.triton.launch import cdiv, launch, multiprocessors, next_power_of_2

# On paper, not measured. A program has two tiles of 8 KiB under way. Four of them a multiprocessor are twice the bytes
# that cover an H100's memory latency (3.4 TB/s times about 0.7 µs, over 132 multiprocessors: 18 KiB).
PROGRAMS = 4  # a multiprocessor, at least, where splitting can make as many
MIN_TRIPS = 8  # of a split's loop: with fewer, filling the pipeline and the second launch would weigh too much
WORKSPACE_SHARE = 1 / 4  # of the bytes that are read: the most that partial sums, written and read, may add
MOST_LINEARS = 3  # of one launch, that read one input: queries, keys and values
SUM_BLOCK = 512  # sums that a program of the second launch finishes


@triton.jit
def project_kernel(
    x_ptr,  # [M, K]
    v_ptr,  # [K, R], any strides, any float dtype
    seed_ptr,  # i64 [], or None: no dropout
    s_ptr,  # [M, R] in x's dtype, rows apart by stride_sm; or [splits, M, R] in fp32: partial sums
    M,
    K,
    K_SPLIT,  # columns of one split, a multiple of BLOCK_K
    stride_vk,
    stride_vr,
    stride_sm,
    scale,  # s / (1 - p)
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    _project_tile(
        x_ptr, v_ptr, seed_ptr, s_ptr, tl.program_id(1), M, K, K_SPLIT, stride_vk, stride_vr, stride_sm, scale,
        R, THRESHOLD, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip


@triton.jit
def projects_kernel(
    x0_ptr,  # [M, K0]
    x1_ptr,  # [M, K1], or None
    x2_ptr,  # [M, K2], or None
    v0_ptr,  # [K0, R0], any float dtype
    v1_ptr,
    v2_ptr,
    s_ptr,  # [M, R0 + R1 + R2] in x's dtype, rows apart by stride_sm; or [splits, …] in fp32: partial sums
    M,
    K0,
    K1,
    K2,
    K_SPLIT,  # columns of one split, a multiple of BLOCK_K; a narrow x has no columns in the last splits, which are 0
    stride_sm,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid = tl.program_id(1)
    x_ptr, v_ptr, K, R, first = x0_ptr, v0_ptr, K0, R0, 0
    if x1_ptr is not None:  # a choice of operands, not of code: one loop takes fewer registers than three
        of_next = pid >= tl.cdiv(R0, BLOCK_R)
        pid = tl.where(of_next, pid - tl.cdiv(R0, BLOCK_R), pid)
        x_ptr, v_ptr = tl.where(of_next, x1_ptr, x_ptr), tl.where(of_next, v1_ptr, v_ptr)
        K, R, first = tl.where(of_next, K1, K), tl.where(of_next, R1, R), tl.where(of_next, R0, first)
        if x2_ptr is not None:
            of_last = of_next & (pid >= tl.cdiv(R1, BLOCK_R))
            pid = tl.where(of_last, pid - tl.cdiv(R1, BLOCK_R), pid)
            x_ptr, v_ptr = tl.where(of_last, x2_ptr, x_ptr), tl.where(of_last, v2_ptr, v_ptr)
            K, R, first = tl.where(of_last, K2, K), tl.where(of_last, R2, R), tl.where(of_last, R0 + R1, first)
    _project_tile(
        x_ptr, v_ptr, None, s_ptr + first, pid, M, K, K_SPLIT, R, 1, stride_sm, 1.0, R, 0, BLOCK_M, BLOCK_K, BLOCK_R
    )


@triton.jit
def _project_tile(
    x_ptr, v_ptr, seed_ptr, s_ptr, tile, M, K, K_SPLIT, stride_vk, stride_vr, stride_sm, scale, R,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    end = tl.minimum(split * K_SPLIT + K_SPLIT, K)
    acc = projected(
        x_ptr, v_ptr, seed, m, 0, r, M, K, split * K_SPLIT, end, stride_vk, stride_vr, R,
        THRESHOLD, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    s_ptrs = s_ptr + (split.to(tl.int64) * M + m)[:, None] * stride_sm + r[None, :]
    tl.store(s_ptrs, (acc * scale).to(s_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def projected(
    x_ptr, v_ptr, seed, m, first, r, M, K, start, end, stride_vk, stride_vr, R,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """drop(x) V over columns start to end of x: rows m of x [M, K], columns r of V [K, R]: fp32 [BLOCK_M, BLOCK_R].

    With a seed, row m has the mask of row m - first.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in range(start, end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        if seed is not None:
            x = tl.where(keep(seed, (m - first)[:, None], k[None, :], THRESHOLD), x, 0.0)
        v_ptrs = v_ptr + k[:, None].to(tl.int64) * stride_vk + r[None, :] * stride_vr
        v = tl.load(v_ptrs, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, v.to(x_ptr.dtype.element_ty), acc, input_precision="ieee")
    return acc


@triton.jit
def _sum_rows_kernel(
    partial_ptr,  # fp32 [splits, M, R]
    s_ptr,  # [M, R], rows apart by stride_sm
    n,  # M · R
    splits,
    stride_sm,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = sum_of_splits(partial_ptr + i, n, splits, i < n, BLOCK)
    tl.store(s_ptr + i // R * stride_sm + i % R, total.to(s_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def sum_of_splits(ptrs, size, splits, mask, BLOCK: tl.constexpr):
    """Σ over splits, in their order, of the values at `ptrs`; the next split's are `size` further."""
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += size
    return total


def split_sum(
    length: int, block: int, programs: int, n_read: int, outputs: int, device: torch.device
) -> tuple[int, int]:
    """(steps of one split, splits) of a sum over `length` steps in tiles of `block`.

    There are as many splits as make PROGRAMS programs a multiprocessor, but a split has MIN_TRIPS tiles or more, and
    the partial sums move at most WORKSPACE_SHARE of the bytes that are read.

    Args:
        programs: tiles of the result.
        n_read: bytes that are read.
        outputs: elements of the result.
    """
    wanted = cdiv(PROGRAMS * multiprocessors(device), max(1, programs))
    allowed = min(length // (MIN_TRIPS * block), int(WORKSPACE_SHARE * n_read / (8 * max(1, outputs))))
    of_one = cdiv(cdiv(length, max(1, min(wanted, allowed))), block) * block
    return max(of_one, block), max(1, cdiv(length, max(of_one, block)))


def project_tiles(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Tile sizes, warps and stages. Every choice fits 64 KiB of shared memory and 255 registers (see CASES)."""
    if dtype == torch.float32:  # no matrix units
        return {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2}
    block_r = min(128, max(16, next_power_of_2(rank)))
    # V is read again for each tile of rows, from the L2 cache: rows enough that x stays the most of what is read
    return {
        "BLOCK_M": 64,
        "BLOCK_K": 64,
        "BLOCK_R": block_r,
        "num_warps": 8 if block_r == 64 else 4,
        "num_stages": 2 if block_r > 64 else 3,
    }


def project(
    x: Tensor,
    v: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """scale · drop(x) v in x's dtype [M, R]; x [M, K] contiguous, v [K, R] of any strides."""
    (m, k), rank = x.shape, v.shape[1]
    tiles = project_tiles(x.dtype, rank)
    s = torch.empty(m, rank, dtype=x.dtype, device=x.device)
    grid = (cdiv(m, tiles["BLOCK_M"]), cdiv(rank, tiles["BLOCK_R"]))
    n_read = m * k * x.element_size()
    of_one, splits = split_sum(k, tiles["BLOCK_K"], grid[0] * grid[1], n_read, m * rank, x.device)
    to = s if splits == 1 else torch.empty(splits * m, rank, dtype=torch.float32, device=x.device)
    args = (x, v, seed if p else None, to, m, k, of_one, *v.stride(), to.stride(0), scale / (1 - p))
    launch(project_kernel, (*grid, splits), *args, R=rank, THRESHOLD=threshold(p), **tiles, fp_fusion=True)
    if splits > 1:
        _sum_rows(to, s, splits)
    return s


def projects(xs: Sequence[Tensor], vs: Sequence[Tensor], out: Tensor) -> None:
    """Write [x₁ v₁ … xₙ vₙ] to `out` [M, Σ R], contiguous in its rows; of up to MOST_LINEARS x [M, K] and v [K, R],
    contiguous."""
    m, columns, ranks = len(out), [x.shape[1] for x in xs], [v.shape[1] for v in vs]
    tiles = project_tiles(out.dtype, max(ranks))
    grid = (cdiv(m, tiles["BLOCK_M"]), sum(cdiv(r, tiles["BLOCK_R"]) for r in ranks))
    n_read = m * sum(columns) * out.element_size()
    of_one, splits = split_sum(max(columns), tiles["BLOCK_K"], grid[0] * grid[1], n_read, out.numel(), out.device)
    to = out if splits == 1 else torch.empty(splits * m, sum(ranks), dtype=torch.float32, device=out.device)
    args = (*three(xs), *three(vs), to, m, *three(columns, 0), of_one, to.stride(0), *three(ranks, 0))
    launch(projects_kernel, (*grid, splits), *args, **tiles, fp_fusion=True)
    if splits > 1:
        _sum_rows(to, out, splits)


def _sum_rows(partial: Tensor, out: Tensor, splits: int) -> None:
    args = (partial, out, out.numel(), splits, out.stride(0))
    grid = (cdiv(out.numel(), SUM_BLOCK),)
    launch(_sum_rows_kernel, grid, *args, R=out.shape[1], BLOCK=SUM_BLOCK, fp_fusion=True)


def three(given: Sequence, default=None) -> tuple:
    """`given`, of up to MOST_LINEARS linears, as a kernel takes it."""
    return (*given, *(default,) * (MOST_LINEARS - len(given)))


def _case(rank: int, backward: bool = False, p: float = 0.0, dtype: str = "bf16") -> Case:
    """`project` of x, or of dY in backward, for a rank."""
    x, v = meta(4096, 4096, dtype=dtype), meta(4096, rank) if backward else meta(rank, 4096).t()
    return Case(
        kernel="lora_project",
        config="-".join([f"r{rank}", dtype] + ["backward"] * backward + ["dropout"] * bool(p)),
        call=lambda: project(x, v, 2.0, p, meta(dtype=torch.int64) if p else None),
        fn=project_kernel,
        values=lambda a: a.BLOCK_M * a.BLOCK_K,
        bytes_per_value=DTYPES[dtype].itemsize,
        flops_per_value=lambda a: 2 * a.BLOCK_R,
        loop=True,
        # An H100 reads 2-byte elements at the rate of 17 instructions an element: beyond, memory is not the bound.
        # The hash of dropout takes about 14 of them.
        max_instr=None if dtype == "fp32" else 28.0 if p else 17.0 if rank <= 128 else 22.0,
        min_load_bits=128,
        mma=dtype != "fp32",
    )


def _joined_case(rank: int) -> Case:
    """`projects` of the gradients of queries, keys and values."""
    dys = [meta(4096, n, dtype="bf16") for n in (4096, 1024, 1024)]
    bs = [meta(dy.shape[1], rank, dtype="bf16") for dy in dys]
    return dataclasses.replace(
        _case(rank, backward=True),
        config=f"r{rank}-bf16-joined",
        call=lambda: projects(dys, bs, meta(4096, 3 * rank, dtype="bf16")),
        fn=projects_kernel,
    )


def _sum_case() -> Case:
    """The second launch of `project`."""
    return Case(
        kernel="lora_sum",
        config="project",
        call=lambda: project(meta(2048, 4096, dtype="bf16"), meta(16, 4096).t(), 2.0),
        fn=_sum_rows_kernel,
        values=lambda a: a.BLOCK,
        bytes_per_value=4.0,
        loop=True,
        max_instr=11.0,
        min_load_bits=128,
    )


CASES = [
    *[_case(rank, backward) for rank in (16, 64, 512) for backward in (False, True)],
    *[_case(64, p=0.1, dtype=dtype) for dtype in ("bf16", "fp32")],
    *[_joined_case(rank) for rank in (16, 64)],
    _sum_case(),
]
