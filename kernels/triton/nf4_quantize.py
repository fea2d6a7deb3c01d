"""NF4 and the other 4-bit data types in Triton: quantize. kernels/nf4.py has the formula and the format.

One launch finds absmax and the nearest codes and packs them; of a block format it divides by the scales that it is
given. The code of x = w / absmax is found by the decision bounds between the levels. Those of NF4 and INT4 are more
than 1/16 apart, so each of 33 bins of that width holds at most one, and
    code = codes[k] + (x > bounds[k]),    k = round(16 · x) + 16,
takes two table lookups and no search. Any other data type takes four comparisons down a search tree
(`codebook.code_table` chooses). w is read once; neither x nor unpacked codes are materialised.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import BLOCK_FORMATS, BLOCKSIZES, code_table, default_blocksize
from kernels.triton.case import DTYPES, Case, meta
from kernels.triton.launch import cdiv, launch
from kernels.weight import packed_sizes

PROGRAM = 16384  # values of a program, which loads the tables once for them and handles them in steps
STEP = 2048  # values that live in registers at once: 64 registers a thread, 4096 would take over 100
# values of a partial block that are handled at once. Division needs registers that other code does not.
_PART = tl.constexpr(512)
_TINY_BITS = tl.constexpr(0x006CE3EE)  # of 1e-38 in fp32, the least that bitsandbytes divides by


@triton.jit
def nibble_shifts():  # [8]
    """Bit position in a little-endian 32-bit word of the codes of its eight values."""
    value = tl.arange(0, 8)
    return value // 2 * 8 + 4 - value % 2 * 4


@triton.jit
def _above(x, bounds, i):
    """1 where x > bounds[i], else 0: the sign bit of their difference."""
    return ((tl.gather(bounds, i, 0) - x).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _code_of(x, codes, bounds, BINS: tl.constexpr):
    """Codes of scaled values x, int32; NaN gets that of the largest level, as any x above it."""
    LARGE: tl.constexpr = 1.0 if BINS else 8.0  # above all bounds
    x = tl.where(x <= LARGE, x, LARGE)
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
    scale_ptr,
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
    block = tl.arange(0, BLOCKS)
    if scale_ptr is None:
        # As integers the bits of |w| order as the numbers do, with NaN above them all: a NaN is never lost.
        absmax = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # [BLOCKS]
        inverse = tl.math.div_rn(1.0, tl.maximum(absmax, _TINY_BITS).to(tl.float32, bitcast=True))
        tl.store(absmax_ptr + tile * BLOCKS + block, absmax.to(tl.float32, bitcast=True), mask=block < live)
        w = w * inverse[:, None]
    else:
        scale = tl.load(scale_ptr + tile * BLOCKS + block, mask=block < live, other=1.0)
        w = tl.math.div_rn(w, tl.broadcast_to(scale[:, None], [BLOCKS, BLOCKSIZE]))
    code = _code_of(tl.reshape(w, [STEP]), codes, bounds, BINS)
    words = tl.sum(tl.reshape(code, [STEP // 8, 8]) << nibble_shifts()[None, :], axis=1)  # [STEP / 8]
    word = tl.arange(0, STEP // 8)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tile * (STEP // 8)
    tl.store(words_ptr + word, words, mask=word // (BLOCKSIZE // 8) < live)


@triton.jit
def _quantize_partial_block(
    w_ptr, codes, bounds, packed_ptr, absmax_ptr, scale_ptr, n, BINS: tl.constexpr, BLOCKSIZE: tl.constexpr
):
    """The last n % BLOCKSIZE values: divided by absmax, not multiplied, and absmax is at least 1e-38 (as in torch)."""
    block = n // BLOCKSIZE
    if scale_ptr is None:
        i = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
        w = tl.load(w_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        absmax = tl.maximum(tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0), _TINY_BITS)
        absmax = absmax.to(tl.float32, bitcast=True)
        tl.store(absmax_ptr + block, absmax)
    else:
        absmax = tl.load(scale_ptr + block)
    PART: tl.constexpr = BLOCKSIZE if BLOCKSIZE < _PART else _PART
    for start in range(block * BLOCKSIZE, n, PART):
        value = start + tl.arange(0, PART)
        part = tl.load(w_ptr + value, mask=value < n, other=0.0).to(tl.float32)
        scaled = tl.where(value < n, tl.math.div_rn(part, absmax), 0.0)
        code = tl.reshape(_code_of(scaled, codes, bounds, BINS), [PART // 2, 2])
        byte = tl.sum(code << (4 - tl.arange(0, 2) * 4)[None, :], axis=1).to(tl.uint8)
        j = start // 2 + tl.arange(0, PART // 2)
        tl.store(packed_ptr + j, byte, mask=j * 2 < n)


@triton.jit
def _quantize_kernel(
    w_ptr,  # [n]
    codes_ptr,  # i32 [64] by bin, or [16]
    bounds_ptr,  # fp32 [64] by bin, or [16]
    packed_ptr,  # u8 [ceil(n / 2)], 4-byte aligned
    absmax_ptr,  # fp32 [blocks], or None: it is not asked for
    scale_ptr,  # None, or fp32 [blocks]: divide by it in place of absmax
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
            _quantize_tile(
                w_ptr, codes, bounds, packed_ptr, absmax_ptr, scale_ptr, first + step, BLOCKS, BINS, BLOCKSIZE, STEP
            )
    else:
        for tile in range(first, tl.cdiv(n, STEP)):
            live = tl.minimum(n // BLOCKSIZE - tile * BLOCKS, BLOCKS).to(tl.int32)
            _quantize_tile(
                w_ptr, codes, bounds, packed_ptr, absmax_ptr, scale_ptr,
                tile, live, BINS, BLOCKSIZE, STEP,
            )  # fmt: skip
        if n % BLOCKSIZE > 0:
            _quantize_partial_block(w_ptr, codes, bounds, packed_ptr, absmax_ptr, scale_ptr, n, BINS, BLOCKSIZE)


def tiles_of(step: int, blocksize: int) -> dict[str, int]:
    """Constexprs that cut a program of PROGRAM values into steps of `step` values, or of one larger block."""
    step = max(step, blocksize)
    return {"BLOCKSIZE": blocksize, "STEP": step, "STEPS": PROGRAM // step}


def quantize_4bit(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    absmax = torch.empty(packed_sizes(w.numel(), blocksize)[1], dtype=torch.float32, device=w.device)
    return _codes(w, absmax, None, blocksize, quant_type), absmax


def encode_4bit(w: Tensor, scale: Tensor, blocksize: int, quant_type: str) -> Tensor:
    return _codes(w, None, scale, blocksize, quant_type)


def _codes(w: Tensor, absmax: Tensor | None, scale: Tensor | None, blocksize: int, quant_type: str) -> Tensor:
    """The packed codes of w by `scale`, or by its absmax, which is written."""
    n, device = w.numel(), w.device
    packed = torch.empty(packed_sizes(n, blocksize)[0], dtype=torch.uint8, device=device)
    codes, bounds, by_bin = code_table(quant_type, device)
    launch(
        _quantize_kernel, (cdiv(n, PROGRAM),),
        w, codes, bounds, packed, absmax, scale, n, BINS=by_bin, **tiles_of(STEP, blocksize), fp_fusion=False,
    )  # fmt: skip
    return packed


def _quantize_case(blocksize: int, dtype: str, bins: bool = True) -> Case:
    w = meta(4096 * 4096 + 1, dtype=dtype)  # a multiple of 16 would cost a little less
    fp32 = dtype == "fp32"
    if bins:
        max_instr, max_instr_on = (21.0, {"sm_75": 21.5}) if fp32 else (18.0, {"sm_75": 18.5, "sm_120": 18.5})
    else:
        max_instr, max_instr_on = 31.0 if fp32 else 28.5, {}
    return Case(
        kernel="nf4_quantize",
        config=f"b{blocksize}-{dtype}" if bins else f"search-b{blocksize}-{dtype}",
        call=lambda: quantize_4bit(w, blocksize, "nf4" if bins else "fp4"),
        fn=_quantize_kernel,
        values=PROGRAM,
        bytes_per_value=(4 if fp32 else 2) + 0.5 + 4 / blocksize,
        max_instr=max_instr,
        max_instr_on=max_instr_on,
        min_load_bits=128,
        min_store_bits=32,
        only_on=("sm_75",) if dtype == "fp16" and blocksize != 64 else (),
    )


def _encode_case(quant_type: str, dtype: str) -> Case:
    w, blocksize = meta(4096 * 4096 + 1, dtype=dtype), default_blocksize(quant_type)
    scale = meta(packed_sizes(w.numel(), blocksize)[1])
    return Case(
        kernel="nf4_quantize",
        config=f"scales-b{blocksize}-{dtype}",
        call=lambda: encode_4bit(w, scale, blocksize, quant_type),
        fn=_quantize_kernel,
        values=PROGRAM,
        bytes_per_value=(4 if dtype == "fp32" else 2) + 0.5 + 4 / blocksize,
        launches=4,  # the largest value of each block, its scale, and the scale's number
        max_instr=34.5,
        min_load_bits=128,
        min_store_bits=32,
    )


# All that the launchers may be asked for, with three exceptions. 16 bits are bf16: fp16 differs in the conversion
# alone, and is compiled at the default blocksize, and where there is no bf16. The search of other data types differs
# from the bins in a few instructions a value, and is compiled at the default and the largest blocksize.
CASES = [
    *[_quantize_case(size, dtype) for size in BLOCKSIZES for dtype in DTYPES],
    *[_quantize_case(size, dtype, bins=False) for size in (64, 4096) for dtype in DTYPES],
    *[_encode_case(quant_type, dtype) for quant_type in BLOCK_FORMATS for dtype in ("bf16", "fp32")],
]
