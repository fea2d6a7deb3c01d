"""The product of 5 to 64 tokens with a packed weight, by the matrix units: terms of x Wᵀ that gemm.py's epilogue sums.

    yᵀ = W xᵀ, W [N, K] in four bits, x [M, K]

A program multiplies 64 rows of codes with x over one split of K, 128 columns a trip. W is the left operand: as the
right one each warp would decode all of it. Codes and absmax are read ahead, codes two trips and absmax one, in 128-bit
words of 32 columns of one row.

The codes never leave the thread that read them. A sum may run over the columns in any order, if W and x have the same
one. So columns are renamed such that the 32 codes that a thread reads are those that the matrix instruction expects in
it:

    column of x and W        = 32 · lane + 8 · word + 2 · pair + i          lane, word, pair: 0 … 3, i: 0, 1
    column of the product    = 32 · word + 8 · pair + 2 · lane + i
    row of a program's tile  = 16 · warp + 8 · half + r                     warp: 0 … 3, half: 0, 1, r: 0 … 7
    row as it is read        = 32 · half + 8 · warp + r

An element of W is made once, by one shuffle and one product with absmax, and is rounded to x's dtype: it is the
dequantized weight to the bit. x goes through shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, absmax_map, levels
from kernels.triton.absmax import load_row_absmax
from kernels.triton.case import Case, meta, meta_packed
from kernels.triton.launch import cdiv, launch, next_power_of_2, split_columns
from kernels.triton.nf4_quantize import nibble_shifts
from kernels.weight import Weight

MAX_TOKENS = 64
BLOCK_N, BLOCK_K, NUM_WARPS = 64, 128, 4  # as above; literals in the kernel, where shapes must be


@triton.jit
def _small_batch_kernel(
    x_ptr,  # [M, K], two bytes an element
    packed_ptr,  # u8 [N · K / 2], 4-byte aligned
    absmax_ptr,  # fp32 [blocks], or u8 with double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_offset_ptr,  # fp32 [] or None
    map_ptr,  # fp32 [256] or None
    levels_ptr,  # fp32 [16]
    partial_ptr,  # fp32 [splits, M, N]
    M,
    N,
    K,  # a multiple of 32
    K_SPLIT,  # columns of one split, a multiple of 128
    BLOCKSIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least M
):
    first = tl.program_id(0) * 64
    split = tl.program_id(1)
    PARTS: tl.constexpr = 2 if BLOCKSIZE == 16 else 1  # blocks in the 32 codes that a thread reads
    m = tl.arange(0, BLOCK_M)
    table = tl.load(levels_ptr + tl.arange(0, 32) % 16)  # twice, so that a lane holds one
    table = tl.broadcast_to(table[None, None, :], [4, 64, 32])
    start = split * K_SPLIT
    end = tl.minimum(start + K_SPLIT, K)
    words = _words(packed_ptr, first, start, N, K, end)
    next_words = _words(packed_ptr, first, start + 128, N, K, end)
    absmax = _absmax(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, start, N, K, end, BLOCKSIZE
    )  # fmt: skip
    acc = tl.zeros([64, BLOCK_M], tl.float32)
    for k0 in range(start, end, 128):
        words_after = _words(packed_ptr, first, k0 + 256, N, K, end)
        next_absmax = _absmax(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, k0 + 128, N, K, end, BLOCKSIZE
        )
        k = k0 + tl.arange(0, 128)
        x_ptrs = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
        x = tl.load(x_ptrs, mask=(m < M)[:, None] & (k < end)[None, :], other=0.0)
        x = tl.permute(tl.reshape(x, [BLOCK_M, 4, 16, 2]), [0, 2, 1, 3])  # [token, word and pair, lane, i]
        code = ((words[:, :, None] >> nibble_shifts()[None, None, :]) & 15).to(tl.int32)
        code = tl.permute(tl.reshape(code, [2, 4, 8, 4, 32]), [1, 0, 4, 2, 3])  # [warp, half, code, r, lane]
        level = tl.gather(table, tl.reshape(code, [4, 64, 32]), 2)
        level = tl.permute(tl.reshape(level, [4, 2, 16, 2, 8, 4]), [0, 1, 4, 2, 5, 3])  # [warp, half, r, …, lane, i]
        # [warp, half, r, part of a lane's 32 columns, lane]
        scale = tl.permute(tl.reshape(absmax, [PARTS, 2, 4, 8, 4]), [2, 1, 3, 0, 4])
        level = tl.reshape(level, [4, 2, 8, PARTS, 16 // PARTS, 4, 2])
        w = tl.reshape((level * scale[:, :, :, :, None, :, None]).to(x.dtype), [64, 128])
        acc = tl.dot(w, tl.reshape(x, [BLOCK_M, 128]).T, acc, input_precision="ieee")
        words, next_words, absmax = next_words, words_after, next_absmax
    n = first + tl.arange(0, 64)
    partial_ptrs = partial_ptr + (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(partial_ptrs, acc, mask=(n < N)[:, None] & (m < M)[None, :])


# What is read has one dimension of threads: of several, versions of Triton differ in which one gets a warp's lanes.
# Numbers of 128-bit words and of blocks have 32 bits, enough for 2**34 weights.


@triton.jit
def _row(q, first, N):
    """The row that thread q % 128 reads as its q // 128th. One behind the last is the last again, and not written."""
    i = q // 4
    return tl.minimum(first + i // 8 % 4 * 16 + i // 32 * 8 + i % 8, N - 1)


@triton.jit
def _words(packed_ptr, first, k0, N, K, end):  # u32 [256, 4]
    """The codes of 128 columns from k0 on; 0 from column `end` on."""
    q = tl.arange(0, 256)
    row, lane = _row(q, first, N), q % 4
    ptrs = packed_ptr.to(tl.pointer_type(tl.uint32)) + (row * (K // 32) + k0 // 32 + lane).to(tl.int64) * 4
    return tl.load(ptrs[:, None] + tl.arange(0, 4)[None, :], mask=(k0 + lane * 32 < end)[:, None], other=0)


@triton.jit
def _absmax(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, k0, N, K, end, BLOCKSIZE: tl.constexpr
):  # fp32 [PARTS · 256]
    """absmax of each 32 columns from k0 on, or of each 16 in blocks of so many: the first 16, then the others."""
    WIDTH: tl.constexpr = 16 if BLOCKSIZE == 16 else 32
    q = tl.arange(0, 32 // WIDTH * 256)
    row, lane, part = _row(q % 256, first, N), q % 4, q // 256
    block = (row * (K // WIDTH) + k0 // WIDTH + lane * (32 // WIDTH) + part) // (BLOCKSIZE // WIDTH)
    return load_row_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, block, k0 + lane * 32 < end)


def supports(x: Tensor, weight: Weight) -> bool:
    """True if `few_tokens` can multiply x [M, K] with this weight. There are no matrix units for fp32."""
    fits = 0 < x.shape[0] <= MAX_TOKENS and x.shape[1] % 32 == 0
    return weight.packed and fits and x.dtype != torch.float32


def few_tokens(x: Tensor, weight: Weight) -> Tensor:
    """Terms of x Wᵀ, fp32 [splits, M, N], for `gemm` to add up; x [M, K] contiguous, M ≤ 64, K a multiple of 32."""
    packed, state = weight.values, weight.quant_state
    if packed.data_ptr() % 4:  # a slice of a bigger buffer: the kernel reads words
        packed = packed.clone()
    (m, k), n, device = x.shape, weight.shape[0], x.device
    rows = cdiv(n, BLOCK_N)
    columns, splits = split_columns(k, BLOCK_K, rows)
    partial = torch.empty(splits, m, n, dtype=torch.float32, device=device)
    launch(
        _small_batch_kernel, (rows, splits),
        x, packed, state.absmax, state.nested_absmax, state.nested_offset,
        absmax_map(state.quant_type, device) if state.nested else None, levels(state.quant_type, device),
        partial, m, n, k, columns,
        BLOCKSIZE=state.blocksize, BLOCK_M=max(16, next_power_of_2(m)),
        num_warps=NUM_WARPS, num_stages=1, fp_fusion=False,
    )  # fmt: skip
    return partial


def _case(tokens: int, double_quant: bool = True, dtype: str = "bf16", quant_type: str = "nf4") -> Case:
    x = meta(tokens, 4096, dtype=dtype)
    weight = meta_packed(4096, 4096, double_quant=double_quant, quant_type=quant_type)
    blocksize, name = weight.quant_state.blocksize, "" if quant_type == "nf4" else f"-{quant_type}"
    halves = blocksize == 16  # two of absmax in 32 columns
    return Case(
        kernel="nf4_gemm",
        config=f"m{tokens}-b{blocksize}-{'double-' if double_quant else ''}{dtype}{name}",
        call=lambda: few_tokens(x, weight),
        fn=_small_batch_kernel,
        values=BLOCK_N * BLOCK_K,
        bytes_per_value=0.5 + (1 + 4 / NESTED_BLOCKSIZE if double_quant else 4) / blocksize,
        flops_per_value=lambda a: 2 * a.BLOCK_M,
        loop=True,
        launches=2,
        max_instr={16: 6.3, 32: 7.8, 64: 8.6}[tokens] + 0.6 * halves,
        max_instr_on={"sm_120": {16: 7.1, 32: 8.3, 64: 10.6}[tokens] + 0.6 * halves},
        max_registers=128 if tokens <= 16 else 255,
        min_load_bits=128,
        mma=True,
    )


CASES = [
    *[_case(tokens) for tokens in (16, 32, 64)],
    *[_case(16, double_quant=False), _case(16, dtype="fp16")],
    *[_case(tokens, quant_type="nvfp4") for tokens in (16, 64)],
]
