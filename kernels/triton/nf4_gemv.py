"""The product of 1 to 4 tokens with a packed weight in one launch, without matrix units.

    y = gain ⊙ (x Wᵀ + S V) + bias         x [M, K], W [N, K] in four bits, S [M, R], V [R, N]

Reading the codes is the work. A thread reads 32 consecutive codes of a row in one 128-bit word; it has a word of each
of ROWS rows under way, and in a longer row their successors, so that a multiprocessor waits for tens of KiB at once.
The levels are in the registers of a warp, one a lane, and a lookup is a shuffle. x is read once for ROWS rows. absmax
of both levels is decoded once for 32 codes, or for the 16 of a block of NVFP4, and multiplies their sum.

The warps of a program split a row among them, and the sum over threads and warps has one order: two runs give the same
bits. Rows are split no further, so that nothing is left for a second launch: even 1024 rows of 4096 columns are 1024
warps. x = 1 in one column and 0 elsewhere gives the dequantized weight to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, absmax_map, levels
from kernels.triton.absmax import load_row_absmax
from kernels.triton.case import Case, meta, meta_packed
from kernels.triton.launch import cdiv, launch, next_power_of_2
from kernels.weight import Weight

MAX_TOKENS = 4  # x takes 32 registers a token
MAX_ROWS = 8  # of a program: 32 registers of codes
MIN_ROWS = 2  # x is read once for them
WARPS_WANTED = 1024  # about two for each of a large GPU's 528 schedulers; below, programs get fewer rows
# A lane's codes of one row, and a warp's. They are literals in the kernel too, where shapes must be.
GROUP = 32
WARP_COLUMNS = 1024


@triton.jit
def _gemv_kernel(
    x_ptr,  # [M, K]
    packed_ptr,  # u8 [N · K / 2], 4-byte aligned
    absmax_ptr,  # fp32 [blocks], or u8 with double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_offset_ptr,  # fp32 [] or None
    map_ptr,  # fp32 [256] or None
    levels_ptr,  # fp32 [16]
    s_ptr,  # [M, R], rows apart by stride_sm, or None
    v_ptr,  # [R, N], any strides, any float dtype
    gain_ptr,  # fp32 [N], or None
    bias_ptr,  # [N], or None
    y_ptr,  # [M, N]
    z_ptr,  # [M, N], or None: z is not kept
    M,
    N,
    K,  # a multiple of 32
    stride_sm,
    stride_vr,
    stride_vn,
    R: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    TOKENS: tl.constexpr,  # at least M
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,  # num_warps
    BLOCK_R: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, TOKENS)
    table = tl.load(levels_ptr + tl.arange(0, 32) % 16)  # twice, so that a lane holds one
    table = tl.broadcast_to(table[None, None, :], [WARPS, ROWS, 32])
    # What is read has one dimension of threads, row by row or token by token: of several, versions of Triton differ in
    # which one gets a warp's lanes. Instead of a row or token behind the last one the last is read again, and not
    # written. Numbers of 128-bit words and of blocks have 32 bits, enough for 2**34 weights.
    THREADS: tl.constexpr = WARPS * 32
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS * THREADS) // THREADS
    row = tl.minimum(row, N - 1)
    row_lane = tl.arange(0, ROWS * THREADS) % THREADS
    token = tl.minimum(tl.arange(0, TOKENS * THREADS) // THREADS, M - 1)
    token_lane = tl.arange(0, TOKENS * THREADS) % THREADS
    groups = K // 32
    PARTS: tl.constexpr = 2 if BLOCKSIZE == 16 else 1  # blocks in a lane's 32 codes
    acc = tl.zeros([TOKENS, ROWS, WARPS, 32], tl.float32)
    coming = _words(packed_ptr, row, row_lane, groups)
    for first in range(0, groups, THREADS):
        words = coming
        group = first + row_lane
        coming = _words(packed_ptr, row, group + THREADS, groups)
        word = _split4(words, ROWS, WARPS)
        x_ptrs = x_ptr + token * K + (first + token_lane) * 32
        inside = first + token_lane < groups
        for part in tl.static_range(PARTS):
            if PARTS == 2:
                block = (row * groups + group) * 2 + part
            else:
                block = (row * groups + group) // (BLOCKSIZE // 32)
            absmax = load_row_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, block, group < groups)
            absmax = tl.reshape(absmax, [ROWS, WARPS, 32])
            total = tl.zeros([TOKENS, ROWS, WARPS, 32], tl.float32)
            for j in tl.static_range(4 // PARTS * part, 4 // PARTS * (part + 1)):
                x = _eight(x_ptrs + 8 * j, inside, TOKENS, WARPS)
                for i in tl.static_range(8):
                    code = ((word[j] >> (i // 2 * 8 + 4 - i % 2 * 4)) & 15).to(tl.int32)  # [ROWS, WARPS, 32]
                    # A warp's lanes last and the warps first: so Triton makes the lookup a shuffle.
                    level = tl.permute(tl.gather(table, tl.permute(code, [1, 0, 2]), 2), [1, 0, 2])
                    level = tl.broadcast_to(level[None, :, :, :], [TOKENS, ROWS, WARPS, 32])
                    total = tl.fma(level, tl.broadcast_to(x[i][:, None, :, :], [TOKENS, ROWS, WARPS, 32]), total)
            acc = tl.fma(total, tl.broadcast_to(absmax[None, :, :, :], [TOKENS, ROWS, WARPS, 32]), acc)
    z = tl.sum(tl.reshape(acc, [TOKENS, ROWS, WARPS * 32]), axis=2)  # [TOKENS, ROWS]

    if s_ptr is not None:
        for r0 in tl.static_range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            s_ptrs = s_ptr + m[:, None] * stride_sm + r[None, :]
            s = tl.load(s_ptrs, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
            v_ptrs = v_ptr + n[:, None] * stride_vn + r[None, :].to(tl.int64) * stride_vr
            v = tl.load(v_ptrs, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
            z += tl.sum(s[:, None, :] * v[None, :, :], axis=2)
    places = m[:, None].to(tl.int64) * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + places, z.to(z_ptr.dtype.element_ty), mask=inside)
    if gain_ptr is not None:
        z *= tl.load(gain_ptr + n, mask=n < N, other=0.0)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + places, z.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _words(packed_ptr, row, group, groups):  # u32 [ROWS · THREADS, 4]
    """The codes of a group of each row, both [ROWS · THREADS]; 0 outside."""
    ptrs = packed_ptr.to(tl.pointer_type(tl.uint32)) + (row * groups + group).to(tl.int64) * 4
    return tl.load(ptrs[:, None] + tl.arange(0, 4)[None, :], mask=(group < groups)[:, None], other=0)


@triton.jit
def _split4(t, A: tl.constexpr, B: tl.constexpr):
    """t[:, :, :, i] for i = 0 … 3 of t [A, B, 32, 4] or what has its elements: a choice of registers."""
    even, odd = tl.split(tl.reshape(t, [A, B, 32, 2, 2]))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def _eight(ptrs, inside, TOKENS: tl.constexpr, WARPS: tl.constexpr):
    """The eight values from `ptrs` [TOKENS · WARPS · 32] on, each fp32 [TOKENS, WARPS, 32], read 128 bits at a time."""
    if ptrs.dtype.element_ty == tl.float32:
        i = tl.arange(0, 4)[None, :]
        low = tl.load(ptrs[:, None] + i, mask=inside[:, None], other=0.0)
        high = tl.load(ptrs[:, None] + 4 + i, mask=inside[:, None], other=0.0)
        return _split4(low, TOKENS, WARPS) + _split4(high, TOKENS, WARPS)
    else:
        i = tl.arange(0, 8)[None, :]
        x = tl.load(ptrs[:, None] + i, mask=inside[:, None], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, [TOKENS, WARPS, 32, 4, 2]))
        x0, x2, x4, x6 = _split4(even, TOKENS, WARPS)
        x1, x3, x5, x7 = _split4(odd, TOKENS, WARPS)
        return x0, x1, x2, x3, x4, x5, x6, x7


def _tiles(m: int, n: int, k: int, dtype: torch.dtype, blocksize: int) -> dict[str, int]:
    """Rows and warps of a program. Every choice fits the registers (see CASES)."""
    parts = cdiv(k, WARP_COLUMNS)
    # as many warps a row as leave at most an eighth of them without columns
    warps = next(w for w in (4, 2, 1) if 7 * w * cdiv(parts, w) <= 8 * parts)
    rows = MAX_ROWS // 2 if m > 2 and (dtype == torch.float32 or blocksize == 16) else MAX_ROWS
    while rows > MIN_ROWS and cdiv(n, rows) * warps < WARPS_WANTED:
        rows //= 2
    return {"TOKENS": next_power_of_2(m), "ROWS": rows, "WARPS": warps, "num_warps": warps, "num_stages": 1}


def supports(x: Tensor, weight: Weight) -> bool:
    """True if `gemv` can multiply x [M, K] with this weight: 128-bit words must not cross a row or a block."""
    return weight.packed and 0 < x.shape[0] <= MAX_TOKENS and x.shape[1] % GROUP == 0


def gemv(
    x: Tensor,
    weight: Weight,
    s: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, z or None): z = x Wᵀ + s v, y = gain ⊙ z + bias.

    x [M, K] is contiguous, M ≤ 4, K a multiple of 32; s [M, R] is contiguous in its rows, v [R, N] may have any
    strides.
    """
    packed, state = weight.values, weight.quant_state
    if packed.data_ptr() % 4:  # a slice of a bigger buffer: the kernel reads words
        packed = packed.clone()
    (m, k), n, device = x.shape, weight.shape[0], x.device
    y = torch.empty(m, n, dtype=x.dtype, device=device)
    z = torch.empty(m, n, dtype=x.dtype, device=device) if keep_z else None
    rank, tiles = 0 if s is None else s.shape[1], _tiles(m, n, k, x.dtype, state.blocksize)
    launch(
        _gemv_kernel, (cdiv(n, tiles["ROWS"]),),
        x, packed, state.absmax, state.nested_absmax, state.nested_offset,
        absmax_map(state.quant_type, device) if state.nested else None, levels(state.quant_type, device),
        s, v, gain, bias, y, z, m, n, k, *((0, 0, 0) if s is None else (s.stride(0), *v.stride())),
        R=rank, BLOCKSIZE=state.blocksize, BLOCK_R=min(64, next_power_of_2(max(1, rank))), **tiles, fp_fusion=False,
    )  # fmt: skip
    return y, z


def _case(
    tokens: int,
    dtype: str = "bf16",
    rows: int = 4096,
    double_quant: bool = True,
    rank: int | None = None,
    quant_type: str = "nf4",
) -> Case:
    """`gemv` alone, or for a rank with all of DoRA in its epilogue."""
    x = meta(tokens, 4096, dtype=dtype)
    weight = meta_packed(rows, 4096, double_quant=double_quant, quant_type=quant_type)
    others = {} if rank is None else {
        **{"s": meta(tokens, rank, dtype=dtype), "v": meta(rows, rank).t()},
        **{"bias": meta(rows, dtype=dtype), "gain": meta(rows), "keep_z": True},
    }  # fmt: skip
    config = [f"m{tokens}", f"n{rows}", "double", dtype] if double_quant else [f"m{tokens}", f"n{rows}", dtype]
    config += [] if quant_type == "nf4" else [quant_type]
    extra = {1: 0.4, 4: 1.8}[tokens] if quant_type == "nvfp4" else 0.0  # twice as many of absmax; half the rows
    registers = {1: 128, 2: 128, 4: 255}[tokens]  # 255: a multiprocessor holds as many programs with 170, two
    return Case(
        kernel="nf4_gemv",
        config="-".join(config + ([] if rank is None else [f"dora-r{rank}"])),
        call=lambda: gemv(x, weight, **others),
        fn=_gemv_kernel,
        values=lambda a: a.ROWS * a.WARPS * WARP_COLUMNS,
        bytes_per_value=0.5 + (1 + 4 / NESTED_BLOCKSIZE if double_quant else 4) / weight.quant_state.blocksize,
        loop=True,
        max_instr={1: 5.4, 2: 6.4, 4: 9.1}[tokens] + extra,
        max_registers=168 if quant_type == "nvfp4" else registers,
        min_load_bits=128,
    )


# fp16 differs from bf16 in the conversion of x alone.
CASES = [
    *[_case(tokens) for tokens in (1, 2, 4)],
    _case(1, rows=1024),
    _case(1, double_quant=False),
    *[_case(tokens, "fp32") for tokens in (1, 4)],
    *[_case(tokens, rank=rank) for tokens, rank in ((1, 16), (4, 64))],
    *[_case(tokens, quant_type="nvfp4") for tokens in (1, 4)],
]
