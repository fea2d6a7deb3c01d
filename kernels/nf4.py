"""NF4 and the other 4-bit data types and formats: quantize and dequantize.

    absmax_b = max |w_i| over block b                                        fp32
    code_i   = code of the level nearest to w_i / absmax_b                   4 bits
    w'_i     = levels[code_i] · absmax_b

The levels are data, sixteen numbers a data type: NF4, FP4, INT4, each entry of codebook.py. A block format, MXFP4 or
NVFP4, has scales of 8 bits in place of absmax (absmax.py), and code_i is that of the level nearest to w_i / scale_b.

Memory layout, byte for byte bitsandbytes': w is flattened row-major, blocks are `blocksize` consecutive values and
may cross rows, the last block may be partial; two codes a byte, the even element in the high nibble; fp32 absmax a
block. With double quantization the absmax itself is 8 bits (absmax.py). QLoRA, Dettmers et al. 2023, §3.

Special values follow bitsandbytes on a CPU. An all-zero block has absmax 0 and the code of 0, 7 in NF4 (a partial one,
absmax 1e-38). A block with an infinity has absmax inf: finite values get the code of 0, infinities (inf · 0 = NaN)
that of 1, 15 in NF4. A block with a NaN has absmax NaN and the code of 1. Such blocks dequantize to NaN or infinity,
never to a wrong number; which NaN is not defined.
"""

import torch
from torch import Tensor

from kernels.absmax import dequantize_absmax, quantize_absmax, quantize_scales
from kernels.codebook import BLOCK_FORMATS, default_blocksize
from kernels.op import define_op
from kernels.weight import (
    FLOATS,
    QuantState,
    Weight,
    as_weight,
    check_blocksize,
    check_double_quant,
    check_quant_type,
    packed_sizes,
)


@define_op
def _quantize_4bit(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    n_bytes, blocks = packed_sizes(w.numel(), blocksize)
    return w.new_empty(n_bytes, dtype=torch.uint8), w.new_empty(blocks, dtype=torch.float32)


@define_op
def _encode_4bit(w: Tensor, scale: Tensor, blocksize: int, quant_type: str) -> Tensor:
    """The codes alone, by the scale of each block, fp32 [blocks]."""
    return w.new_empty(packed_sizes(w.numel(), blocksize)[0], dtype=torch.uint8)


@define_op
def _dequantize_4bit(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.values.new_empty(weight.shape, dtype=dtype)


def quantize_4bit(
    w: Tensor, blocksize: int | None = None, double_quant: bool | None = None, quant_type: str = "nf4"
) -> tuple[Tensor, QuantState]:
    """Quantize `w` to four bits a value.

    Args:
        w: fp32, fp16 or bf16, any shape; made contiguous if it is not.
        blocksize: values that share an absmax: 32, 64, …, 4096, by default 64. A block format has its own alone.
        double_quant: store absmax in 8 bits (block 256, mean subtracted) instead of fp32; by default False. The scales
            of a block format have 8 bits.
        quant_type: one of `kernels.codebook.quant_types()`: "nf4", "fp4", "int4", "mxfp4", "nvfp4".

    Returns:
        packed: uint8 [ceil(n / 2)], and its QuantState. For NF4 and FP4 equal to `bitsandbytes.functional.
        quantize_4bit(w, …, compress_statistics=double_quant)` on a CPU, whose packed is [ceil(n / 2), 1].

    Raises:
        ValueError: another dtype, block size or data type.
    """
    check_quant_type(quant_type)
    blocksize = default_blocksize(quant_type) if blocksize is None else blocksize
    double_quant = quant_type in BLOCK_FORMATS if double_quant is None else double_quant
    check_blocksize(blocksize, quant_type)
    check_double_quant(double_quant, quant_type)
    if w.dtype not in FLOATS:
        raise ValueError(f"w is {w.dtype}; quantize_4bit takes float32, float16 or bfloat16")
    w = w.detach().contiguous()
    if quant_type in BLOCK_FORMATS:
        scales = quantize_scales(w, quant_type)
        packed = _encode_4bit(w, dequantize_absmax(*scales, quant_type), blocksize, quant_type)
        return packed, QuantState(scales[0], w.shape, w.dtype, blocksize, *scales[1:], quant_type=quant_type)
    packed, absmax = _quantize_4bit(w, blocksize, quant_type)
    nested: tuple[Tensor | None, Tensor | None] = (None, None)
    if double_quant:
        absmax, *nested = quantize_absmax(absmax)
    return packed, QuantState(absmax, w.shape, w.dtype, blocksize, *nested, quant_type=quant_type)


def dequantize_4bit(
    packed: Tensor | Weight, quant_state: QuantState | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor that `packed` stands for, in `dtype` (default: the dtype it had).

    Args:
        packed: uint8 with ceil(n / 2) values, contiguous, any shape, and its quant_state; or both as a Weight.
        quant_state: as `quantize_4bit` returned it.
        dtype: fp32, fp16 or bf16. The product level · absmax is computed in fp32 and rounded once.

    Raises:
        ValueError: no quant_state, a tensor with the wrong dtype or number of values, another dtype.
    """
    weight = as_weight(packed, quant_state)
    if not weight.packed:
        raise ValueError("dequantize_4bit needs the quant_state of the codes")
    dtype = dtype or weight.dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; dequantize_4bit gives float32, float16 or bfloat16")
    return _dequantize_4bit(weight, dtype)
