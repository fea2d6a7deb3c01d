"""NF4 and the other 4-bit data types in Triton: dequantize, and quantize from nf4_quantize.py. kernels/nf4.py has the
formula and the format.

Codes and absmax, of 8 bits with double quantization, are read in one launch: no fp32 absmax is made of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import BLOCKSIZES, NESTED_BLOCKSIZE, absmax_map, levels
from kernels.triton.absmax import load_absmax, load_row_absmax
from kernels.triton.case import DTYPES, Case, meta_packed
from kernels.triton.launch import cdiv, launch
from kernels.triton.nf4_quantize import PROGRAM, encode_4bit, nibble_shifts, quantize_4bit, tiles_of
from kernels.weight import Weight

__all__ = ["CASES", "dense", "dequantize_4bit", "dequantize_program", "encode_4bit", "quantize_4bit", "words"]

# Values that live in registers at once: 4096 keep dequantize at 40 registers a thread, and so three quarters of the
# warps resident.
STEP = 4096


@triton.jit
def _dequantize_tile(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels, out_ptr,
    tile, groups, BLOCKSIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The first `groups` groups of 32 values of tile `tile`.

    32 values are 16 bytes of codes: masks that count them leave loads and stores 128 bits wide.
    """
    BLOCKS: tl.constexpr = STEP // BLOCKSIZE
    live = (groups * 32 + BLOCKSIZE - 1) // BLOCKSIZE
    absmax = load_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, tile * BLOCKS, live, BLOCKS)
    word = tl.arange(0, STEP // 8)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tile * (STEP // 8)
    words = tl.load(words_ptr + word, mask=word // 4 < groups, other=0)  # [STEP / 8]
    code = (words[:, None] >> nibble_shifts()[None, :]) & 15  # [STEP / 8, 8]
    level = tl.gather(levels, tl.reshape(code, [STEP]), 0)
    w = tl.reshape(tl.reshape(level, [BLOCKS, BLOCKSIZE]) * absmax[:, None], [STEP])
    value = tl.arange(0, STEP)
    tl.store(out_ptr + tile * STEP + value, w.to(out_ptr.dtype.element_ty), mask=value // 32 < groups)


@triton.jit
def _dequantize_tail(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels, out_ptr,
    n, BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """The last n % 32 values: their bytes need not fill a word."""
    i = n // 32 * 32 + tl.arange(0, 32)
    byte = tl.load(packed_ptr + i // 2, mask=i < n, other=0).to(tl.int32)
    code = (byte >> (4 - i % 2 * 4).to(tl.int32)) & 15
    absmax = load_row_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, i // BLOCKSIZE, i < n)
    tl.store(out_ptr + i, (tl.gather(levels, code, 0) * absmax).to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # u8 [ceil(n / 2)], 4-byte aligned
    absmax_ptr,  # fp32 [blocks], or u8 with double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_offset_ptr,  # fp32 [] or None
    map_ptr,  # fp32 [256] or None
    levels_ptr,  # fp32 [16]
    out_ptr,  # [n]
    n: tl.int64,
    BLOCKSIZE: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
):
    dequantize_program(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels_ptr, out_ptr, n,
        BLOCKSIZE, STEP, STEPS,
    )  # fmt: skip


@triton.jit
def dequantize_program(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels_ptr, out_ptr,
    n, BLOCKSIZE: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The values of this program."""
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    first = tl.program_id(0).to(tl.int64) * STEPS
    if (first + STEPS) * STEP <= n:
        for step in tl.static_range(STEPS):
            _dequantize_tile(
                packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels, out_ptr,
                first + step, STEP // 32, BLOCKSIZE, STEP,
            )  # fmt: skip
    else:
        for tile in range(first, tl.cdiv(n, STEP)):
            groups = tl.minimum(n // 32 - tile * (STEP // 32), STEP // 32).to(tl.int32)
            _dequantize_tile(
                packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels, out_ptr,
                tile, groups, BLOCKSIZE, STEP,
            )  # fmt: skip
        _dequantize_tail(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels, out_ptr, n, BLOCKSIZE
        )


def words(packed: Tensor) -> Tensor:
    """`packed` where 32-bit words begin: a slice of a bigger buffer may not, and kernels read words."""
    return packed.clone() if packed.data_ptr() % 4 else packed


def dequantize_4bit(weight: Weight, dtype: torch.dtype) -> Tensor:
    packed, state = words(weight.values), weight.quant_state
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    n = out.numel()
    launch(
        _dequantize_kernel,
        (cdiv(n, PROGRAM),),
        packed,
        state.absmax,
        state.nested_absmax,
        state.nested_offset,
        absmax_map(state.quant_type, packed.device) if state.nested else None,
        levels(state.quant_type, packed.device),
        out,
        n,
        **tiles_of(STEP, state.blocksize),
        fp_fusion=False,
    )
    return out


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight in `dtype`; of a dense weight, which must have this dtype, the weight itself."""
    return dequantize_4bit(weight, dtype) if weight.packed else weight.values


def _dequantize_case(blocksize: int, double_quant: bool, dtype: str, quant_type: str = "nf4") -> Case:
    weight = meta_packed(4096, 4096, blocksize=blocksize, double_quant=double_quant, quant_type=quant_type)
    absmax_bytes = 1 + 4 / NESTED_BLOCKSIZE if double_quant else 4
    fp32 = dtype == "fp32"  # half as many values to a 128-bit store: more absmax and addresses a value
    return Case(
        kernel="nf4_dequantize",
        config="-".join([f"b{blocksize}", *["double"] * double_quant, dtype, *[quant_type] * (quant_type != "nf4")]),
        call=lambda: dequantize_4bit(weight, DTYPES[dtype]),
        fn=_dequantize_kernel,
        values=PROGRAM,
        bytes_per_value=0.5 + (4 if fp32 else 2) + absmax_bytes / blocksize,
        max_instr=8.5 if fp32 else 6.5,
        max_instr_on={} if fp32 else {"sm_75": 7.5},
        max_registers=80 if fp32 else 64,
        min_load_bits=128,
        min_store_bits=128,
        only_on=("sm_75",) if dtype == "fp16" and blocksize != 64 else (),
    )


# 16 bits are bf16: fp16 differs in the conversion alone, and is compiled at the default blocksize, and where there is
# no bf16.
CASES = [
    *[_dequantize_case(size, double, dtype) for size in BLOCKSIZES for double in (True, False) for dtype in DTYPES],
    *[_dequantize_case(16, True, dtype, "nvfp4") for dtype in DTYPES],
]
