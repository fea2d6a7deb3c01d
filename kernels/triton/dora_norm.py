"""Sums of squares of the rows of W and of W + sBA, straight from NF4 tiles or from a dense W.

    norm_i = sqrt(Σ_k (W_ik + s·Σ_j B_ij A_jk)²)                            fp32

A program walks BLOCK_N rows of W: a tile of sBA comes from the matrix units, is added to the tile of W in registers,
squared and summed. Neither W nor BA nor W + sBA is materialised. The factored form (the reference's) needs as many
matrix products, but cancels where sBA ≈ -W and must then look at W again; adding before squaring cannot cancel and
costs two multiply-adds a weight. DoRA, Liu et al. 2024, §4.3.

Memory layout: an NF4 byte holds an even column in its high nibble and the next one in its low nibble. So A is split
into its even and its odd columns, [2, rank, in / 2], and the product with each half meets one nibble of the bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, absmax_map, levels
from kernels.triton.absmax import load_row_absmax
from kernels.triton.case import DTYPES, Case, meta, meta_packed
from kernels.triton.launch import cdiv, launch, next_power_of_2, split_columns
from kernels.triton.nf4 import dense
from kernels.weight import Weight

NUM_WARPS = 4
FINISH_BLOCK = 256


@triton.jit
def _load_b(b_ptr, scaling, rows, r, N, R: tl.constexpr, DTYPE: tl.constexpr):  # [BLOCK_N, BLOCK_R]
    """A tile of sB, rounded to the compute dtype as forward rounds it."""
    inside = (rows < N)[:, None] & (r < R)[None, :]
    b = tl.load(b_ptr + rows[:, None] * R + r[None, :], mask=inside, other=0.0)
    return (b.to(tl.float32) * scaling).to(DTYPE)


@triton.jit
def _norm_nf4_kernel(
    packed_ptr,  # u8 [N · K / 2]
    absmax_ptr,  # fp32 [blocks], or u8 with double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_offset_ptr,  # fp32 [] or None
    map_ptr,  # fp32 [256] or None
    levels_ptr,  # fp32 [16]
    a_ptr,  # [2, R, K / 2] in the compute dtype, or None: the norm of W alone
    b_ptr,  # [N, R], any float dtype, or None
    partial_ptr,  # fp32 [splits, N]
    N,
    K,  # a multiple of BLOCK_K
    K_SPLIT,  # columns of one split, a multiple of BLOCK_K
    scaling,
    R: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides BLOCKSIZE, or a multiple of it: a row of a tile lies in PARTS whole blocks
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    total = squares_nf4(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels_ptr, a_ptr, b_ptr,
        rows, N, K, split, K_SPLIT, scaling, R, BLOCKSIZE, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    tl.store(partial_ptr + split.to(tl.int64) * N + rows, total, mask=rows < N)


@triton.jit
def squares_nf4(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels_ptr, a_ptr, b_ptr,
    rows, N, K, split, K_SPLIT, scaling, R: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ (W + sBA)² over the columns of a split, for `rows` below N: fp32 [BLOCK_N]."""
    PARTS: tl.constexpr = BLOCK_K // BLOCKSIZE if BLOCK_K > BLOCKSIZE else 1
    HALF: tl.constexpr = BLOCK_K // 2
    byte = tl.arange(0, HALF)
    r = tl.arange(0, BLOCK_R)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    byte_ptrs = packed_ptr + rows[:, None] * (K // 2) + byte[None, :]
    if a_ptr is not None:
        a_ptrs = a_ptr + r[:, None] * (K // 2) + byte[None, :]
        if BLOCK_R >= R:
            b = _load_b(b_ptr, scaling, rows, r, N, R, a_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_N, HALF], tl.float32)
    for k in range(split * K_SPLIT, tl.minimum(split * K_SPLIT + K_SPLIT, K), BLOCK_K):
        even = tl.zeros([BLOCK_N, HALF], tl.float32)
        odd = tl.zeros([BLOCK_N, HALF], tl.float32)
        if a_ptr is not None:
            for r0 in range(0, R, BLOCK_R):
                if BLOCK_R < R:
                    b = _load_b(b_ptr, scaling, rows, r0 + r, N, R, a_ptr.dtype.element_ty)
                inside = (r0 + r < R)[:, None]
                a_even = tl.load(a_ptrs + r0 * (K // 2) + k // 2, mask=inside, other=0.0)  # [BLOCK_R, HALF]
                a_odd = tl.load(a_ptrs + (R + r0) * (K // 2) + k // 2, mask=inside, other=0.0)
                even = tl.dot(b, a_even, even, input_precision="ieee")
                odd = tl.dot(b, a_odd, odd, input_precision="ieee")
        blocks = ((rows * K + k)[:, None] + tl.arange(0, PARTS)[None, :] * BLOCKSIZE) // BLOCKSIZE  # [BLOCK_N, PARTS]
        absmax = load_row_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, blocks, (rows < N)[:, None])
        scale = tl.reshape(tl.broadcast_to(absmax[:, :, None], [BLOCK_N, PARTS, HALF // PARTS]), [BLOCK_N, HALF])
        codes = tl.load(byte_ptrs + k // 2, mask=(rows < N)[:, None], other=0).to(tl.int32)
        high = tl.gather(levels, tl.reshape(codes >> 4, [BLOCK_N * HALF]), 0)
        low = tl.gather(levels, tl.reshape(codes & 15, [BLOCK_N * HALF]), 0)
        even = tl.fma(tl.reshape(high, [BLOCK_N, HALF]), scale, even)
        odd = tl.fma(tl.reshape(low, [BLOCK_N, HALF]), scale, odd)
        total = tl.fma(odd, odd, tl.fma(even, even, total))
    return tl.sum(total, 1)


@triton.jit
def _norm_dense_kernel(
    w_ptr,  # [N, K]
    a_ptr,  # [R, K] in w's dtype, or None: the norm of W alone
    b_ptr,  # [N, R], any float dtype, or None
    partial_ptr,  # fp32 [splits, N]
    N,
    K,
    K_SPLIT,  # columns of one split, a multiple of BLOCK_K
    scaling,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    total = squares_dense(w_ptr, a_ptr, b_ptr, rows, N, K, split, K_SPLIT, scaling, R, BLOCK_N, BLOCK_K, BLOCK_R)
    tl.store(partial_ptr + split.to(tl.int64) * N + rows, total, mask=rows < N)


@triton.jit
def squares_dense(
    w_ptr, a_ptr, b_ptr, rows, N, K, split, K_SPLIT, scaling, R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """As `squares_nf4`, of a dense W."""
    r = tl.arange(0, BLOCK_R)
    if a_ptr is not None and BLOCK_R >= R:
        b = _load_b(b_ptr, scaling, rows, r, N, R, a_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k0 in range(split * K_SPLIT, tl.minimum(split * K_SPLIT + K_SPLIT, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + rows[:, None] * K + k[None, :], mask=(rows < N)[:, None] & (k < K)[None, :], other=0.0)
        w = w.to(tl.float32)  # [BLOCK_N, BLOCK_K]
        if a_ptr is not None:
            for r0 in range(0, R, BLOCK_R):
                if BLOCK_R < R:
                    b = _load_b(b_ptr, scaling, rows, r0 + r, N, R, a_ptr.dtype.element_ty)
                inside = (r0 + r < R)[:, None] & (k < K)[None, :]
                a = tl.load(a_ptr + (r0 + r)[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0)
                w = tl.dot(b, a, w, input_precision="ieee")
        total = tl.fma(w, w, total)
    return tl.sum(total, 1)


@triton.jit
def finish_kernel(
    partial_ptr,  # fp32 [splits, N]: sums of squares; or None
    known_ptr,  # fp32 [N], or None: the norm, where it is known
    magnitude_ptr,  # [N], or None
    norm_ptr,  # fp32 [N]
    gain_ptr,  # fp32 [N], or None
    N,
    splits,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if known_ptr is not None:
        norm = tl.load(known_ptr + n, mask=n < N, other=0.0)
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for split in range(splits):
            total += tl.load(partial_ptr + split * N + n, mask=n < N, other=0.0)
        norm = tl.sqrt(total)
    tl.store(norm_ptr + n, norm, mask=n < N)
    if magnitude_ptr is not None:
        magnitude = tl.load(magnitude_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(gain_ptr + n, divide(magnitude, norm), mask=n < N)


@triton.jit
def divide(x, norm):
    """x / norm, and 0 where norm is 0: a row of zeros has no direction to scale. Rounded as torch's division."""
    return tl.where(norm == 0.0, 0.0, tl.math.div_rn(x, tl.where(norm == 0.0, 1.0, norm)))


def norm_tiles(rank: int, columns: int, dtype: torch.dtype, packed: bool) -> dict[str, int]:
    """Tile sizes and stages. Every choice fits 99 KiB of shared memory and 255 registers (see CASES)."""
    padded = max(16, next_power_of_2(rank))
    if dtype == torch.float32:  # no matrix units: small products, or their operands spill
        tiles = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16, "num_stages": 2}
    elif padded <= 128:  # 32 rows a warp: with fewer, reading absmax and A weighs more on each weight
        tiles = {"BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_R": padded, "num_stages": 2}
    elif padded == 256:
        tiles = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 256, "num_stages": 1}
    elif padded == 512 and packed:
        tiles = {"BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_R": 512, "num_stages": 1}
    else:
        tiles = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 128, "num_stages": 1}
    if columns % 64 or (padded > 64 and not packed):
        tiles["BLOCK_K"] = 32
    return tiles


def sums_of_squares(
    weight: Weight,
    dtype: torch.dtype,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    """Σ_k (W + sBA)² of the rows of W [N, K], or of W alone, in splits of K: fp32 [splits, N]."""
    (n, k), state, device = weight.shape, weight.quant_state, weight.device
    rank = 0 if lora_A is None else lora_A.shape[0]
    tiles = norm_tiles(rank, k, dtype, weight.packed)
    if weight.packed and state.blocksize <= 32:  # blocks of 16 in wider tiles would spill
        tiles["BLOCK_K"] = 32
    rows = cdiv(n, tiles["BLOCK_N"])
    columns, splits = split_columns(k, tiles["BLOCK_K"], rows)
    partial = torch.empty(splits, n, dtype=torch.float32, device=device)
    grid = (rows, splits)
    options = {"R": rank, **tiles, "num_warps": NUM_WARPS, "fp_fusion": False}
    lora_B = None if lora_B is None else lora_B.contiguous()
    if weight.packed and k % tiles["BLOCK_K"] == 0:
        if lora_A is not None:
            halves = torch.empty(2, rank, k // 2, dtype=dtype, device=device)
            lora_A = halves.copy_(lora_A.reshape(rank, k // 2, 2).permute(2, 0, 1))
        launch(
            _norm_nf4_kernel, grid,
            weight.values, state.absmax, state.nested_absmax, state.nested_offset,
            absmax_map(state.quant_type, device) if state.nested else None, levels(state.quant_type, device),
            lora_A, lora_B, partial, n, k, columns, scaling, BLOCKSIZE=state.blocksize, **options,
        )  # fmt: skip
    else:  # a row of a tile would cross NF4 blocks, or bytes
        w = dense(weight, dtype).contiguous()
        lora_A = None if lora_A is None else lora_A.to(dtype).contiguous()
        launch(_norm_dense_kernel, grid, w, lora_A, lora_B, partial, n, k, columns, scaling, **options)
    return partial


def norm_and_gain(
    weight: Weight,
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(‖W + sBA‖ of each row, magnitude / ‖W + sBA‖ if there is a magnitude), fp32 [N].

    If the norm is `known`, it is copied: a result of an op must not be an argument.
    """
    partial = sums_of_squares(weight, dtype, lora_A, lora_B, scaling) if known is None else None
    n, device = weight.shape[0], weight.device
    norm = torch.empty(n, dtype=torch.float32, device=device)
    gain = None if magnitude is None else torch.empty(n, dtype=torch.float32, device=device)
    known = None if known is None else known.contiguous()
    magnitude = None if magnitude is None else magnitude.contiguous()
    args = (partial, known, magnitude, norm, gain, n, 0 if partial is None else len(partial))
    launch(finish_kernel, (cdiv(n, FINISH_BLOCK),), *args, BLOCK=FINISH_BLOCK, fp_fusion=False)
    return norm, gain


def _case(rank: int, kind: str, dtype: str = "bf16", blocksize: int = 64, quant_type: str = "nf4") -> Case:
    """`sums_of_squares` for a rank, over a "double", "single" or "dense" weight."""
    if kind == "dense":
        weight, bytes_per_value = Weight(meta(4096, 4096, dtype=dtype)), DTYPES[dtype].itemsize
    else:
        weight = meta_packed(4096, 4096, blocksize=blocksize, double_quant=kind == "double", quant_type=quant_type)
        bytes_per_value = 0.5 + (1 + 4 / NESTED_BLOCKSIZE if kind == "double" else 4) / blocksize
    # the norm of a packed W alone is computed in fp32 (`weight_norm_sq` in dora.py)
    compute = DTYPES[dtype] if rank or kind == "dense" else torch.float32
    adapter = (meta(rank, 4096), meta(4096, rank)) if rank else (None, None)
    budgets = {}  # most instructions a weight, by the rank
    if kind != "dense" and dtype != "fp32":
        budgets = {64: {16: 10.0, 64: 10.0, 128: 13.0, 256: 20.0}, 16: {16: 10.8, 64: 11.9}}.get(blocksize, {})
    return Case(
        kernel="dora_norm_dense" if kind == "dense" else "dora_norm_nf4",
        config=f"r{rank}-b{blocksize}-{'nf4' if kind == 'single' else kind}-{dtype}"
        + ("" if quant_type == "nf4" else f"-{quant_type}"),
        call=lambda: sums_of_squares(weight, compute, *adapter, 2.0),
        fn=_norm_dense_kernel if kind == "dense" else _norm_nf4_kernel,
        values=lambda a: a.BLOCK_N * a.BLOCK_K,
        bytes_per_value=bytes_per_value,
        flops_per_value=(lambda a: 2 * a.BLOCK_R) if rank else 0.0,
        loop=lambda a: a.BLOCK_R >= a.R,  # else the innermost loop runs over ranks, not over weights
        launches=3 if rank else 2,  # A is laid out for this kernel; the sums of the splits are added
        max_instr=budgets.get(rank),
        min_load_bits=128 if rank else 64,
        mma=rank > 0 and dtype != "fp32",
    )


def _finish(known: bool) -> Case:
    """`norm_and_gain` of a weight of 4096 rows."""
    weight, adapter = meta_packed(4096, 4096), (meta(16, 4096), meta(4096, 16))
    norm = meta(4096) if known else None
    return Case(
        kernel="dora_norm_finish",
        config="known" if known else "gain",
        call=lambda: norm_and_gain(weight, torch.bfloat16, *adapter, 2.0, meta(4096), norm),
        fn=finish_kernel,
        values=FINISH_BLOCK,
        bytes_per_value=16.0 if known else 4.0,
        launches=1 if known else 3,
    )


CASES = [
    *[_finish(known) for known in (False, True)],
    *[_case(rank, "double") for rank in (0, 16, 64, 128, 256, 512, 1024)],
    *[_case(64, "single"), _case(64, "double", blocksize=32), _case(64, "double", "fp32")],
    *[_case(rank, "double", blocksize=16, quant_type="nvfp4") for rank in (0, 16, 64)],
    *[_case(rank, "dense") for rank in (0, 64, 128, 256, 512)],
    _case(64, "dense", "fp32"),
]
