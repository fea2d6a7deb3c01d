"""NF4 and the other 4-bit data types: the format, and dequantize (nf4_quantize.py has the other direction).

    absmax_b = max |w_i| over block b                                        fp32
    code_i   = code of the level nearest to w_i / absmax_b                   4 bits
    w'_i     = levels[code_i] · absmax_b

The levels are data, sixteen numbers a data type: NF4, FP4, INT4, whatever codebook.py has an entry for.

Memory layout, byte for byte bitsandbytes': w is flattened row-major, blocks are `blocksize` consecutive values and
may cross rows, the last block may be partial; two codes a byte, the even element in the high nibble; fp32 absmax a
block. With double quantization the absmax itself is 8 bits (see double_quant.py), and is dequantized in the same
launch: no fp32 absmax is materialised. QLoRA, Dettmers et al. 2023, §3.

Special values follow bitsandbytes on a CPU. An all-zero block has absmax 0 and the code of 0, 7 in NF4 (a partial one,
absmax 1e-38). A block with an infinity has absmax inf: finite values get the code of 0, infinities (inf · 0 = NaN)
that of 1, 15 in NF4. A block with a NaN has absmax NaN and the code of 1. Such blocks dequantize to NaN or infinity,
never to a wrong number; which NaN is not defined.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpu_dequantize
from kernels.codebook import BLOCKSIZES, NESTED_BLOCKSIZE, dynamic_map, levels
from kernels.dispatch import use_triton
from kernels.double_quant import load_absmax
from kernels.grid import cdiv
from kernels.library import define_op, register_fake
from kernels.quant_state import FLOATS, QuantState, check_packed
from kernels.spec import KernelSpec

# A program loads the tables once for its 16384 values and handles them in steps. The values of one step live in
# registers at once: 4096 keep dequantize at 40 registers a thread, and so three quarters of the warps resident.
PROGRAM = 16384
STEP = 4096


@triton.jit
def nibble_shifts():  # [8]
    """Bit position in a little-endian 32-bit word of the codes of its eight values."""
    value = tl.arange(0, 8)
    return value // 2 * 8 + 4 - value % 2 * 4


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
    """The last n % 32 values: they share one block, and their bytes need not fill a word."""
    i = n // 32 * 32 + tl.arange(0, 32)
    byte = tl.load(packed_ptr + i // 2, mask=i < n, other=0).to(tl.int32)
    code = (byte >> (4 - i % 2 * 4).to(tl.int32)) & 15
    block = (n - 1) // BLOCKSIZE
    absmax = load_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, block, 1, 1)  # [1]
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


def tiles(step: int, blocksize: int) -> dict[str, int]:
    """Constexprs that cut a program of PROGRAM values into steps of `step` values, or of one larger block."""
    step = max(step, blocksize)
    return {"BLOCKSIZE": blocksize, "STEP": step, "STEPS": PROGRAM // step}


def _launch_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    device = packed.device
    out = torch.empty(shape, dtype=dtype, device=device)
    n = out.numel()
    if packed.data_ptr() % 4:  # a slice of a bigger buffer: the kernel reads words
        packed = packed.clone()
    if n:
        with torch.cuda.device_of(packed):
            _dequantize_kernel[(cdiv(n, PROGRAM),)](
                packed,
                absmax,
                nested_absmax,
                nested_offset,
                None if nested_absmax is None else dynamic_map(device),
                levels(quant_type, device),
                out,
                n,
                **tiles(STEP, blocksize),
                enable_fp_fusion=False,
            )
    return out


@define_op("dequantize_4bit")
def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return dequantize_impl(packed, absmax, nested_absmax, nested_offset, blocksize, quant_type, shape, dtype)


@register_fake("dequantize_4bit")
def _(packed, absmax, nested_absmax, nested_offset, blocksize, quant_type, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


def dequantize_impl(packed: Tensor, *args, reuse: bool = False) -> Tensor:
    """The op's body, for ops that dequantize inside themselves; `reuse`: see cpu_dequantize.py."""
    return (
        _launch_dequantize(packed, *args)
        if use_triton(packed)
        else cpu_dequantize.dequantize_4bit(packed, *args, reuse)
    )


def dequantize_4bit(packed: Tensor, quant_state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that `packed` stands for, in `dtype` (default: the dtype it had).

    Args:
        packed: uint8 with ceil(n / 2) values, contiguous, any shape.
        quant_state: as `quantize_4bit` returned it.
        dtype: fp32, fp16 or bf16. The product level · absmax is computed in fp32 and rounded once.

    Raises:
        ValueError: `packed` or a tensor of `quant_state` has the wrong dtype or number of values.
    """
    dtype = dtype or quant_state.dtype
    check_packed(packed, quant_state)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; dequantize_4bit gives float32, float16 or bfloat16")
    return _dequantize_4bit(
        packed, *quant_state.tensors(), quant_state.blocksize, quant_state.quant_type, quant_state.shape, dtype
    )


def _spec(blocksize: int, double: bool, dtype: str) -> KernelSpec:
    nested = ("nested_absmax_ptr", "nested_offset_ptr", "map_ptr")
    absmax_bytes = 1 + 4 / NESTED_BLOCKSIZE if double else 4
    fp32 = dtype == "fp32"  # half as many values to a 128-bit store: more absmax and addresses a value
    return KernelSpec(
        kernel="nf4_dequantize",
        config=f"b{blocksize}-{'double-' if double else ''}{dtype}",
        fn=_dequantize_kernel,
        signature={"packed_ptr": "*u8", "absmax_ptr": "*u8" if double else "*fp32", "levels_ptr": "*fp32"}
        | {"out_ptr": f"*{dtype}", "n": "i64"}
        | dict.fromkeys(nested if double else (), "*fp32"),
        constexprs=tiles(STEP, blocksize) | dict.fromkeys(() if double else nested),
        values=PROGRAM,
        bytes_per_value=0.5 + (4 if fp32 else 2) + absmax_bytes / blocksize,
        max_instr=8.5 if fp32 else 6.5,
        max_instr_on={} if fp32 else {"sm_75": 7.5},
        max_registers=80 if fp32 else 64,
        min_load_bits=128,
        min_store_bits=128,
        only_on=("sm_75",) if dtype == "fp16" and blocksize != 64 else (),
    )


# All that a launcher may be asked for, except that 16 bits are bf16: fp16 differs in the conversion alone, and is
# compiled at the default blocksize, and where there is no bf16.
AOT_SPECS = [
    _spec(blocksize, double, dtype)
    for blocksize in BLOCKSIZES
    for double in (True, False)
    for dtype in ("bf16", "fp16", "fp32")
]
