"""The linear over a packed weight in Triton: x Wᵀ straight from the codes for few tokens, as in decoding.

    yᵀ = W xᵀ, W [N, K] in NF4, x [M, K] with M ≤ 64

One pass over the packed weight, no dense W. A program multiplies BLOCK_N rows of codes with x over one split of K. The
levels are the left operand: as the right operand each warp would look up all of them. absmax multiplies the product of
a block. Even columns are in the bytes' high nibbles, odd ones in the low nibbles, so each half of the codes meets its
half of x. gemm.py's epilogue sums the splits in a fixed order, so two runs give the same bits. It also adds the adapter
and the bias.

For more tokens a tile of W would be looked up again for each tile of tokens: W is dequantized once, and the product is
the library's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, dynamic_map, levels
from kernels.triton.absmax import load_row_absmax
from kernels.triton.case import Case, meta, meta_packed
from kernels.triton.gemm import gemm
from kernels.triton.launch import cdiv, launch, next_power_of_2, split_columns
from kernels.triton.nf4 import dense
from kernels.weight import Weight

FEW_TOKENS = 64  # up to here; on paper: the lookups then still cost less than reading and writing a dense W
NUM_WARPS = 4


@triton.jit
def _few_tokens_kernel(
    x_ptr,  # [M, K]
    packed_ptr,  # u8 [N · K / 2]
    absmax_ptr,  # fp32 [blocks], or u8 with double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_offset_ptr,  # fp32 [] or None
    map_ptr,  # fp32 [256] or None
    levels_ptr,  # fp32 [16]
    partial_ptr,  # fp32 [splits, M, N]
    M,
    N,
    K,  # a multiple of BLOCK_K
    K_SPLIT,  # columns of one split, a multiple of BLOCK_K
    BLOCKSIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least M
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides BLOCKSIZE: a row of a tile lies in one block
):
    HALF: tl.constexpr = BLOCK_K // 2
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    byte_ptrs = packed_ptr + n[:, None] * (K // 2) + tl.arange(0, HALF)[None, :]
    x_ptrs = x_ptr + m[:, None] * K + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k0 in range(split * K_SPLIT, tl.minimum(split * K_SPLIT + K_SPLIT, K), BLOCK_K):
        codes = tl.load(byte_ptrs + k0 // 2, mask=(n < N)[:, None], other=0).to(tl.int32)
        high = tl.reshape(tl.gather(levels, tl.reshape(codes >> 4, [BLOCK_N * HALF]), 0), [BLOCK_N, HALF])
        low = tl.reshape(tl.gather(levels, tl.reshape(codes & 15, [BLOCK_N * HALF]), 0), [BLOCK_N, HALF])
        x = tl.load(x_ptrs + k0, mask=(m < M)[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(x, [BLOCK_M, HALF, 2]))
        product = tl.dot(high.to(x.dtype), even.T, input_precision="ieee")
        product = tl.dot(low.to(x.dtype), odd.T, product, input_precision="ieee")
        absmax = load_row_absmax(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, (n * K + k0) // BLOCKSIZE, n < N
        )
        acc = tl.fma(product, tl.broadcast_to(absmax[:, None], [BLOCK_N, BLOCK_M]), acc)
    partial_ptrs = partial_ptr + (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(partial_ptrs, acc, mask=(n < N)[:, None] & (m < M)[None, :])


def _tiles(m: int, columns: int, blocksize: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes. Every choice fits 64 KiB of shared memory and 255 registers (see CASES)."""
    block_m = max(16, next_power_of_2(m))
    block_n = 128 if block_m == 16 else 64
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n // 2 if dtype == torch.float32 else block_n,
        "BLOCK_K": 32 if columns % 64 or blocksize == 32 or dtype == torch.float32 else 64,
    }


def supports(x: Tensor, weight: Weight) -> bool:
    """True if `few_tokens` can multiply x [M, K] with this weight, and is taken to be the fastest way."""
    return weight.packed and 0 < x.shape[0] <= FEW_TOKENS and x.shape[1] % 32 == 0


def few_tokens(x: Tensor, weight: Weight) -> Tensor:
    """Terms of x Wᵀ, fp32 [splits, M, N], for `gemm` to add up; x [M, K] contiguous, M ≤ 64, K a multiple of 32."""
    state = weight.quant_state
    (m, k), n, device = x.shape, weight.shape[0], x.device
    tiles = _tiles(m, k, state.blocksize, x.dtype)
    rows = cdiv(n, tiles["BLOCK_N"])
    columns, splits = split_columns(k, tiles["BLOCK_K"], rows)
    partial = torch.empty(splits, m, n, dtype=torch.float32, device=device)
    launch(
        _few_tokens_kernel, (rows, splits),
        x, weight.values, state.absmax, state.nested_absmax, state.nested_offset,
        dynamic_map(device) if state.nested else None, levels(state.quant_type, device),
        partial, m, n, k, columns,
        BLOCKSIZE=state.blocksize, **tiles, num_warps=NUM_WARPS, num_stages=2, fp_fusion=False,
    )  # fmt: skip
    return partial


def nf4_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if supports(x, weight):
        x = x.contiguous()
        return gemm(x, None, bias=bias, xw=few_tokens(x, weight))[0]
    return torch.nn.functional.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def nf4_linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    return dy @ dense(weight, dy.dtype)


def _case(tokens: int, double_quant: bool = True, dtype: str = "bf16") -> Case:
    x, weight = meta(tokens, 4096, dtype=dtype), meta_packed(4096, 4096, double_quant=double_quant)
    max_instr = 7.5 if tokens <= 16 else 12.0 if tokens <= 32 else 15.0
    return Case(
        kernel="nf4_gemm",
        config=f"m{tokens}-b64-{'double-' if double_quant else ''}{dtype}",
        call=lambda: few_tokens(x, weight),
        fn=_few_tokens_kernel,
        values=lambda a: a.BLOCK_N * a.BLOCK_K,
        bytes_per_value=0.5 + (1 + 4 / NESTED_BLOCKSIZE if double_quant else 4) / 64,
        flops_per_value=lambda a: 2 * a.BLOCK_M,
        loop=True,
        launches=2,
        max_instr=max_instr if dtype == "bf16" else None,
        min_load_bits=128,
        mma=dtype != "fp32",
    )


CASES = [
    *[_case(tokens) for tokens in (1, 32, 64)],
    _case(16, double_quant=False),
    *[_case(tokens, dtype="fp32") for tokens in (16, 64)],
]
