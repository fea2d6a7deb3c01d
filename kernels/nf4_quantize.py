"""4-bit quantize: absmax, nearest code and packing in one launch. nf4.py has the formula and the format.

The code of x = w / absmax is found by the decision bounds between the levels. Those of NF4 and INT4 are more than 1/16
apart, so each of 33 bins of that width holds at most one, and
    code = codes[k] + (x > bounds[k]),    k = round(16 · x) + 16,
takes two table lookups and no search. Any other data type takes four comparisons down a search tree
(`codebook.code_table` chooses). w is read once; neither x nor unpacked codes are materialised.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.codebook import BLOCKSIZES, code_table
from kernels.dispatch import use_triton
from kernels.double_quant import quantize_absmax
from kernels.grid import cdiv
from kernels.nf4 import PROGRAM, nibble_shifts, tiles
from kernels.quant_state import FLOATS, QuantState, check_blocksize, check_quant_type, packed_sizes
from kernels.spec import KernelSpec

STEP = 2048  # values in registers at once: 64 registers a thread, 4096 would take over 100
_TINY_BITS = tl.constexpr(0x006CE3EE)  # of 1e-38 in fp32, the least that bitsandbytes divides by


@triton.jit
def _above(x, bounds, i):
    """1 where x > bounds[i], else 0: the sign bit of their difference."""
    return ((tl.gather(bounds, i, 0) - x).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _code_of(x, codes, bounds, BINS: tl.constexpr):
    """Codes of scaled values x, int32; NaN gets that of 1, as any x > 1."""
    x = tl.where(x <= 1.0, x, 1.0)
    if BINS:
        # Adding 1.5 · 2^23 rounds 16 · x to an integer and leaves it in the low bits. Exact, fused or not.
        bin = tl.fma(x, 16.0, 12582912.0 + 16.0).to(tl.int32, bitcast=True) & 63
        above = _above(x, bounds, bin)  # before the other lookup: 64 registers a thread instead of 72
        return tl.gather(codes, bin, 0) + above
    else:
        node = tl.full(x.shape, 1, tl.int32)
        for _ in tl.static_range(4):
            node = 2 * node + _above(x, bounds, node)
        return tl.gather(codes, node - 16, 0)


@triton.jit
def _quantize_tile(
    w_ptr,
    codes,
    bounds,
    packed_ptr,
    absmax_ptr,
    tile,
    live,
    BINS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The first `live` blocks of tile `tile`, all of them full."""
    BLOCKS: tl.constexpr = STEP // BLOCKSIZE
    value = tl.arange(0, STEP)
    w = tl.load(w_ptr + tile * STEP + value, mask=value // BLOCKSIZE < live, other=0.0).to(tl.float32)
    w = tl.reshape(w, [BLOCKS, BLOCKSIZE])
    # As integers the bits of |w| order as the numbers do, with NaN above them all: a NaN is never lost.
    absmax = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # [BLOCKS]
    inverse = tl.math.div_rn(1.0, tl.maximum(absmax, _TINY_BITS).to(tl.float32, bitcast=True))
    code = _code_of(tl.reshape(w * inverse[:, None], [STEP]), codes, bounds, BINS)
    words = tl.sum(tl.reshape(code, [STEP // 8, 8]) << nibble_shifts()[None, :], axis=1)  # [STEP / 8]
    word = tl.arange(0, STEP // 8)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tile * (STEP // 8)
    tl.store(words_ptr + word, words, mask=word // (BLOCKSIZE // 8) < live)
    block = tl.arange(0, BLOCKS)
    tl.store(absmax_ptr + tile * BLOCKS + block, absmax.to(tl.float32, bitcast=True), mask=block < live)


@triton.jit
def _quantize_partial_block(
    w_ptr, codes, bounds, packed_ptr, absmax_ptr, n, BINS: tl.constexpr, BLOCKSIZE: tl.constexpr
):
    """The last n % BLOCKSIZE values: divided by absmax, not multiplied, and absmax is at least 1e-38 (see the twin)."""
    block = n // BLOCKSIZE
    i = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    w = tl.load(w_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    absmax = tl.maximum(tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0), _TINY_BITS)
    absmax = absmax.to(tl.float32, bitcast=True)
    scaled = tl.where(i < n, tl.math.div_rn(w, absmax), 0.0)
    code = tl.reshape(_code_of(scaled, codes, bounds, BINS), [BLOCKSIZE // 2, 2])
    byte = tl.sum(code << (4 - tl.arange(0, 2) * 4)[None, :], axis=1).to(tl.uint8)
    j = block * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)
    tl.store(packed_ptr + j, byte, mask=j * 2 < n)
    tl.store(absmax_ptr + block, absmax)


@triton.jit
def _quantize_kernel(
    w_ptr,  # [n]
    codes_ptr,  # i32 [64] by bin, or [16]
    bounds_ptr,  # fp32 [64] by bin, or [16]
    packed_ptr,  # u8 [ceil(n / 2)], 4-byte aligned
    absmax_ptr,  # fp32 [blocks]
    n: tl.int64,
    BINS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
):
    ENTRIES: tl.constexpr = 64 if BINS else 16
    codes = tl.load(codes_ptr + tl.arange(0, ENTRIES))
    bounds = tl.load(bounds_ptr + tl.arange(0, ENTRIES))
    first = tl.program_id(0).to(tl.int64) * STEPS
    BLOCKS: tl.constexpr = STEP // BLOCKSIZE
    if (first + STEPS) * STEP <= n:
        for step in tl.static_range(STEPS):
            _quantize_tile(w_ptr, codes, bounds, packed_ptr, absmax_ptr, first + step, BLOCKS, BINS, BLOCKSIZE, STEP)
    else:
        for tile in range(first, tl.cdiv(n, STEP)):
            live = tl.minimum(n // BLOCKSIZE - tile * BLOCKS, BLOCKS).to(tl.int32)
            _quantize_tile(w_ptr, codes, bounds, packed_ptr, absmax_ptr, tile, live, BINS, BLOCKSIZE, STEP)
        if n % BLOCKSIZE > 0:
            _quantize_partial_block(w_ptr, codes, bounds, packed_ptr, absmax_ptr, n, BINS, BLOCKSIZE)


def _launch_quantize(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    n, device = w.numel(), w.device
    n_bytes, blocks = packed_sizes(n, blocksize)
    packed = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    if n:
        codes, bounds, by_bin = code_table(quant_type, device)
        with torch.cuda.device_of(w):
            _quantize_kernel[(cdiv(n, PROGRAM),)](
                w, codes, bounds, packed, absmax, n, BINS=by_bin, **tiles(STEP, blocksize), enable_fp_fusion=False
            )
    return packed, absmax


@torch.library.custom_op("qdora::quantize_4bit", mutates_args=())
def _quantize_4bit(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    quantize = _launch_quantize if use_triton(w) else reference.quantize_4bit
    return quantize(w, blocksize, quant_type)


@_quantize_4bit.register_fake
def _(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    n_bytes, blocks = packed_sizes(w.numel(), blocksize)
    return w.new_empty(n_bytes, dtype=torch.uint8), w.new_empty(blocks, dtype=torch.float32)


def quantize_4bit(
    w: Tensor, blocksize: int = 64, double_quant: bool = False, quant_type: str = "nf4"
) -> tuple[Tensor, QuantState]:
    """Quantize `w` to four bits a value.

    Args:
        w: fp32, fp16 or bf16, any shape; made contiguous if it is not.
        blocksize: values that share an absmax: 32, 64, …, 4096.
        double_quant: store absmax in 8 bits (block 256, mean subtracted) instead of fp32.
        quant_type: "nf4", "fp4", "int4" or another key of `kernels.codebook.CODEBOOKS`.

    Returns:
        packed: uint8 [ceil(n / 2)], and its QuantState. For NF4 and FP4 equal to `bitsandbytes.functional.
        quantize_4bit(w, …, compress_statistics=double_quant)` on a CPU, whose packed is [ceil(n / 2), 1].

    Raises:
        ValueError: another dtype, block size or data type.
    """
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    if w.dtype not in FLOATS:
        raise ValueError(f"w is {w.dtype}; quantize_4bit takes float32, float16 or bfloat16")
    packed, absmax = torch.ops.qdora.quantize_4bit(w.detach().contiguous(), blocksize, quant_type)
    nested: tuple[Tensor | None, Tensor | None] = (None, None)
    if double_quant:
        absmax, *nested = quantize_absmax(absmax)
    return packed, QuantState(absmax, w.shape, w.dtype, blocksize, *nested, quant_type=quant_type)


def _spec(blocksize: int, dtype: str, bins: bool = True) -> KernelSpec:
    fp32 = dtype == "fp32"
    if bins:
        max_instr, max_instr_on = (21.0, {"sm_75": 21.5}) if fp32 else (18.0, {"sm_75": 18.5, "sm_120": 18.5})
    else:
        max_instr, max_instr_on = 31.0 if fp32 else 28.5, {}
    return KernelSpec(
        kernel="nf4_quantize",
        config=f"b{blocksize}-{dtype}" if bins else f"search-b{blocksize}-{dtype}",
        fn=_quantize_kernel,
        signature={"w_ptr": f"*{dtype}", "codes_ptr": "*i32", "bounds_ptr": "*fp32"}
        | {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "n": "i64"},
        constexprs={"BINS": bins} | tiles(STEP, blocksize),
        values=PROGRAM,
        bytes_per_value=(4 if fp32 else 2) + 0.5 + 4 / blocksize,
        max_instr=max_instr,
        max_instr_on=max_instr_on,
        min_load_bits=128,
        min_store_bits=32,
        only_on=("sm_75",) if dtype == "fp16" and blocksize != 64 else (),
    )


# All that a launcher may be asked for, fp16 as in nf4.py; the search of other data types, which differs from the bins
# in a few instructions a value, at the default and the largest blocksize.
AOT_SPECS = [_spec(blocksize, dtype) for blocksize in BLOCKSIZES for dtype in ("bf16", "fp16", "fp32")]
AOT_SPECS += [_spec(blocksize, dtype, bins=False) for blocksize in (64, 4096) for dtype in ("bf16", "fp16", "fp32")]
