"""The weights of all experts: dense, those of experts that have rows; and the norm of each row of W_e + sB_e A_e.

One launch for all experts, and with `ends` a program whose experts have no rows does nothing (its norms are 0): the
host does not know which experts have rows. The tiles are dora_norm.py's and nf4.py's.

Dense weights are made in parts of at most PART_BYTES (kernels/weight.py), one after the other in the same memory: of
all experts they would take four times the memory of the packed ones.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import absmax_map, levels
from kernels.triton.case import DTYPES, Case, meta, meta_packed
from kernels.triton.dora_norm import FINISH_BLOCK, NUM_WARPS, finish_kernel, norm_tiles, squares_dense, squares_nf4
from kernels.triton.launch import cdiv, launch, split_columns
from kernels.triton.nf4 import STEP, dequantize_program, words
from kernels.triton.nf4_quantize import PROGRAM, tiles_of
from kernels.weight import Weight, experts_of_part, holding


@triton.jit
def _norm_nf4_kernel(
    packed_ptr,  # u8 [E · N · K / 2]
    absmax_ptr,  # fp32 [blocks], or u8 with double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_offset_ptr,  # fp32 [] or None
    map_ptr,  # fp32 [256] or None
    levels_ptr,  # fp32 [16]
    a_ptr,  # [E, 2, R, K / 2] in the compute dtype
    b_ptr,  # [E, N, R], any float dtype
    ends_ptr,  # i32 [E], or None: all experts
    partial_ptr,  # fp32 [splits, E, N]
    N,
    K,  # a multiple of BLOCK_K
    K_SPLIT,  # columns of one split, a multiple of BLOCK_K
    experts,
    scaling,
    R: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    split = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    rows = expert * N + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = _columns_of_split(ends_ptr, expert, K_SPLIT)
    total = squares_nf4(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels_ptr,
        a_ptr + expert * R * K, b_ptr,
        rows, expert * N + N, K, split, columns, scaling, R, BLOCKSIZE, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    tl.store(partial_ptr + split.to(tl.int64) * experts * N + rows, total, mask=rows < expert * N + N)


@triton.jit(do_not_specialize=["begin"])
def _norm_dense_kernel(
    w_ptr,  # [experts of this launch, N, K]
    a_ptr,  # [E, R, K] in w's dtype
    b_ptr,  # [E, N, R], any float dtype
    ends_ptr,  # i32 [E], or None: all experts
    partial_ptr,  # fp32 [splits, E, N]
    N,
    K,
    K_SPLIT,  # columns of one split, a multiple of BLOCK_K
    experts,
    scaling,
    begin,  # the first expert of this launch
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    split = tl.program_id(1)
    own = tl.program_id(2).to(tl.int64)  # among the experts of this launch
    expert = begin + own
    rows = own * N + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    before = begin.to(tl.int64) * N
    columns = _columns_of_split(ends_ptr, expert, K_SPLIT)
    total = squares_dense(
        w_ptr, a_ptr + expert * R * K, b_ptr + before * R,
        rows, own * N + N, K, split, columns, scaling, R, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    tl.store(partial_ptr + split.to(tl.int64) * experts * N + before + rows, total, mask=rows < own * N + N)


@triton.jit
def _columns_of_split(ends_ptr, expert, K_SPLIT):
    """K_SPLIT, and 0 if the expert has no rows."""
    columns = K_SPLIT
    if ends_ptr is not None:
        before = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        columns = tl.where(tl.load(ends_ptr + expert) > before, K_SPLIT, 0)
    return columns


@triton.jit(do_not_specialize=["skip", "begin"])
def _dequantize_kernel(
    packed_ptr,  # u8 [ceil(n / 2)], 4-byte aligned
    absmax_ptr,  # fp32 [blocks], or u8 with double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_offset_ptr,  # fp32 [] or None
    map_ptr,  # fp32 [256] or None
    levels_ptr,  # fp32 [16]
    ends_ptr,  # i32 [E], or None: all experts
    out_ptr,  # [n]
    n: tl.int64,
    of_one: tl.int64,  # values of an expert
    skip: tl.int64,  # values before its first expert
    begin,  # its first expert
    BLOCKSIZE: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
):
    wanted = True
    if ends_ptr is not None:
        start = tl.program_id(0).to(tl.int64) * STEPS * STEP
        behind = tl.minimum(start + STEPS * STEP, n)
        first = begin + tl.maximum(start - skip, 0) // of_one
        last = begin + tl.maximum(behind - 1 - skip, 0) // of_one
        before = tl.load(ends_ptr + first - 1, mask=first > 0, other=0)
        wanted = tl.load(ends_ptr + last) > before  # one of the experts first … last has rows
    if wanted:
        dequantize_program(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels_ptr, out_ptr,
            n, BLOCKSIZE, STEP, STEPS,
        )  # fmt: skip


def dense_parts(weight: Weight, ends: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first expert, weights [experts, out, in] of it and those after it, in `dtype`), in parts, until all were there.

    A part is overwritten by the next one. Experts without rows may have any numbers. A dense weight is one part, as it
    is.
    """
    if not weight.packed:
        yield 0, weight.values
        return
    total, of_one, device = weight.shape[0], weight.shape[1:].numel(), weight.device
    experts = experts_of_part(weight.shape, dtype)
    parts = [
        (begin, *holding(weight, begin * of_one, min(begin + experts, total) * of_one))
        for begin in range(0, total, experts)
    ]
    buffer = torch.empty(max(part.shape.numel() for _, part, _ in parts), dtype=dtype, device=device)
    for begin, part, skip in parts:
        n, count, state = part.shape.numel(), min(experts, total - begin), part.quant_state
        launch(
            _dequantize_kernel, (cdiv(n, PROGRAM),),
            words(part.values), state.absmax, state.nested_absmax, state.nested_offset,
            absmax_map(state.quant_type, device) if state.nested else None, levels(state.quant_type, device),
            ends, buffer, n, of_one, skip, begin, **tiles_of(STEP, state.blocksize), fp_fusion=False,
        )  # fmt: skip
        yield begin, buffer[skip : skip + count * of_one].view(count, *weight.shape[1:])


def norm_and_gain(
    weight: Weight,
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    known: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(‖W_e + sB_e A_e‖ of each row, magnitude over it if there is one), fp32 [E, N].

    If the norm is `known`, it is copied: a result of an op must not be an argument. With `ends` the norms of experts
    without rows are 0.
    """
    partial = None
    if known is None:
        partial = _sums_of_squares(weight, dtype, lora_A, lora_B, scaling, ends)
    shape, device = weight.shape[:2], weight.device
    norm = torch.empty(shape, dtype=torch.float32, device=device)
    gain = None if magnitude is None else torch.empty(shape, dtype=torch.float32, device=device)
    known = None if known is None else known.contiguous()
    magnitude = None if magnitude is None else magnitude.contiguous()
    n = norm.numel()
    args = (partial, known, magnitude, norm, gain, n, 0 if partial is None else len(partial))
    launch(finish_kernel, (cdiv(n, FINISH_BLOCK),), *args, BLOCK=FINISH_BLOCK, fp_fusion=False)
    return norm, gain


def _sums_of_squares(
    weight: Weight, dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, scaling: float, ends: Tensor | None
) -> Tensor:
    """Σ_k (W_e + sB_e A_e)² of each row, in splits of K: fp32 [splits, E, N]."""
    (experts, n, k), state, device = weight.shape, weight.quant_state, weight.device
    rank = lora_A.shape[1]
    tiles = norm_tiles(rank, k, dtype, weight.packed)
    if weight.packed and state.blocksize <= 32:  # blocks of 16 in wider tiles would spill
        tiles["BLOCK_K"] = 32
    rows = cdiv(n, tiles["BLOCK_N"])
    columns, splits = split_columns(k, tiles["BLOCK_K"], rows * experts)
    partial = torch.empty(splits, experts, n, dtype=torch.float32, device=device)
    grid = (rows, splits, experts)
    numbers = (n, k, columns, experts, scaling)
    options = {"R": rank, **tiles, "num_warps": NUM_WARPS, "fp_fusion": False}
    lora_B = lora_B.contiguous()
    if weight.packed and k % tiles["BLOCK_K"] == 0:
        halves = torch.empty(experts, 2, rank, k // 2, dtype=dtype, device=device)
        halves.copy_(lora_A.reshape(experts, rank, k // 2, 2).permute(0, 3, 1, 2))
        launch(
            _norm_nf4_kernel, grid,
            weight.values, state.absmax, state.nested_absmax, state.nested_offset,
            absmax_map(state.quant_type, device) if state.nested else None, levels(state.quant_type, device),
            halves, lora_B, ends, partial, *numbers, BLOCKSIZE=state.blocksize, **options,
        )  # fmt: skip
    else:  # a row of a tile would cross NF4 blocks, or bytes
        lora_A = lora_A.to(dtype).contiguous()
        for begin, w in dense_parts(weight, ends, dtype):
            args = (w.contiguous(), lora_A, lora_B, ends, partial, *numbers, begin)
            launch(_norm_dense_kernel, (rows, splits, len(w)), *args, **options)
    return partial


def _weight(kind: str, dtype: str) -> Weight:
    """Of 128 experts 2048 → 768."""
    return Weight(meta(128, 768, 2048, dtype=dtype)) if kind == "dense" else meta_packed(128, 768, 2048, dtype=dtype)


def _norm_case(rank: int, kind: str, dtype: str = "bf16", live: bool = False) -> Case:
    """`norm_and_gain`, of all experts or of the live ones alone."""
    ends = meta(128, dtype=torch.int32) if live else None
    weight, budgets = _weight(kind, dtype), {16: 10.0, 64: 10.0, 128: 13.0}  # as in dora_norm.py
    return Case(
        kernel="experts_norm_dense" if kind == "dense" else "experts_norm_nf4",
        config=f"r{rank}-{dtype}" + "-live" * live,
        call=lambda: norm_and_gain(weight, DTYPES[dtype], meta(128, rank, 2048), meta(128, 768, rank), 2.0, ends=ends),
        fn=_norm_dense_kernel if kind == "dense" else _norm_nf4_kernel,
        values=lambda a: a.BLOCK_N * a.BLOCK_K,
        bytes_per_value=DTYPES[dtype].itemsize if kind == "dense" else 0.5 + 1 / 64,
        flops_per_value=lambda a: 2 * a.BLOCK_R,
        loop=True,
        launches=3,
        max_instr=None if kind == "dense" or dtype == "fp32" else budgets[rank],
        min_load_bits=128,
        mma=dtype != "fp32",
    )


def _dequantize_case(dtype: str) -> Case:
    """`dense_parts`, of one part; the budget is that of nf4.py, and a little for the question who has rows."""
    return Case(
        kernel="experts_dequantize",
        config=dtype,
        call=lambda: next(dense_parts(_weight("nf4", dtype), meta(128, dtype=torch.int32), DTYPES[dtype])),
        fn=_dequantize_kernel,
        values=PROGRAM,
        bytes_per_value=0.5 + DTYPES[dtype].itemsize + 1 / 64,
        max_instr=8.6 if dtype == "fp32" else 6.6,
        max_registers=80 if dtype == "fp32" else 64,
        min_load_bits=128,
        min_store_bits=128,
    )


CASES = [
    *[_norm_case(rank, "nf4", live=True) for rank in (16, 64, 128)],
    _norm_case(64, "nf4"),
    _norm_case(64, "nf4", "fp32"),
    _norm_case(64, "dense", live=True),
    _norm_case(64, "dense", "fp32"),
    *[_dequantize_case(dtype) for dtype in ("bf16", "fp32")],
]
