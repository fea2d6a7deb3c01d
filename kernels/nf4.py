"""NF4 quantize and dequantize.

    absmax_b = max |w_i| over block b                                        fp32
    code_i   = number of NF4 decision bounds below w_i / absmax_b            4 bits
    w'_i     = NF4_LEVELS[code_i] · absmax_b

Memory layout, byte for byte bitsandbytes': w is flattened row-major, blocks are `blocksize` consecutive values and
may cross rows, the last block may be partial; two codes a byte, the even element in the high nibble; fp32 absmax a
block. With double quantization the absmax itself is 8 bits (see double_quant.py). QLoRA, Dettmers et al. 2023, §3.

Special values follow bitsandbytes on a CPU. An all-zero block has absmax 0 and codes 7 (a partial one, absmax
1e-38). A block with an infinity has absmax inf: finite values get code 7, infinities (inf · 0 = NaN) code 15. A
block with a NaN has absmax NaN and codes 15. Such blocks dequantize to NaN or infinity, never to a wrong number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.codebook import BLOCKSIZES, NESTED_BLOCKSIZE
from kernels.double_quant import quantize_absmax

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantState:
    """What, beside the packed codes, is needed to get a tensor back.

    Attributes:
        absmax: fp32 [blocks], or uint8 [blocks] codes of the dynamic map when double-quantized.
        shape: shape of the tensor.
        dtype: dtype it had, and the default to dequantize to.
        blocksize: values a block, one of 32, 64, …, 4096.
        nested_absmax: fp32 [ceil(blocks / 256)], or None without double quantization.
        nested_offset: fp32 [], the mean that was subtracted from absmax, or None.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tensors in the order in which ops take them."""
        return self.absmax, self.nested_absmax, self.nested_offset


def check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")


def packed_sizes(n: int, blocksize: int) -> tuple[int, int]:
    """(bytes of codes, blocks) for n values."""
    return -(-n // 2), -(-n // blocksize)


@torch.library.custom_op("qdora::quantize_nf4", mutates_args=())
def _quantize_nf4(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_nf4(w, blocksize)


@_quantize_nf4.register_fake
def _(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n_bytes, blocks = packed_sizes(w.numel(), blocksize)
    return w.new_empty(n_bytes, dtype=torch.uint8), w.new_empty(blocks, dtype=torch.float32)


@torch.library.custom_op("qdora::dequantize_nf4", mutates_args=())
def _dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return dequantize_impl(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype)


@_dequantize_nf4.register_fake
def _(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


def dequantize_impl(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The op's body, for ops that dequantize inside themselves."""
    return reference.dequantize_nf4(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype)


def quantize_nf4(w: Tensor, blocksize: int = 64, double_quant: bool = False) -> tuple[Tensor, QuantState]:
    """Quantize `w` to NF4.

    Args:
        w: fp32, fp16 or bf16, any shape; made contiguous if it is not.
        blocksize: values that share an absmax: 32, 64, …, 4096.
        double_quant: store absmax in 8 bits (block 256, mean subtracted) instead of fp32.

    Returns:
        packed: uint8 [ceil(n / 2)], and its QuantState. Equal to `bitsandbytes.functional.quantize_4bit(w, …,
        quant_type="nf4", compress_statistics=double_quant)` on a CPU, whose packed is [ceil(n / 2), 1].

    Raises:
        ValueError: another dtype or block size.
    """
    check_blocksize(blocksize)
    if w.dtype not in FLOATS:
        raise ValueError(f"w is {w.dtype}; quantize_nf4 takes float32, float16 or bfloat16")
    packed, absmax = torch.ops.qdora.quantize_nf4(w.detach().contiguous(), blocksize)
    nested: tuple[Tensor | None, Tensor | None] = (None, None)
    if double_quant:
        absmax, *nested = quantize_absmax(absmax)
    return packed, QuantState(absmax, w.shape, w.dtype, blocksize, *nested)


def dequantize_nf4(packed: Tensor, quant_state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that `packed` stands for, in `dtype` (default: the dtype it had).

    Args:
        packed: uint8 with ceil(n / 2) values, contiguous, any shape.
        quant_state: as `quantize_nf4` returned it.
        dtype: fp32, fp16 or bf16. The product level · absmax is computed in fp32 and rounded once.

    Raises:
        ValueError: `packed` or a tensor of `quant_state` has the wrong dtype or number of values.
    """
    dtype = dtype or quant_state.dtype
    check_packed(packed, quant_state)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; dequantize_nf4 gives float32, float16 or bfloat16")
    return torch.ops.qdora.dequantize_nf4(
        packed, *quant_state.tensors(), quant_state.blocksize, quant_state.shape, dtype
    )


def check_packed(packed: Tensor, quant_state: QuantState) -> None:
    """Raise ValueError if `packed` and `quant_state` do not belong together."""
    check_blocksize(quant_state.blocksize)
    n_bytes, blocks = packed_sizes(quant_state.shape.numel(), quant_state.blocksize)
    expected = [
        ("packed", packed, torch.uint8, n_bytes),
        ("absmax", quant_state.absmax, torch.uint8 if quant_state.nested else torch.float32, blocks),
    ]
    if quant_state.nested:
        expected += [
            ("nested_absmax", quant_state.nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE)),
            ("nested_offset", quant_state.nested_offset, torch.float32, 1),
        ]
    for name, tensor, dtype, numel in expected:
        if tensor is None or tensor.dtype != dtype or tensor.numel() != numel:
            found = "nothing" if tensor is None else f"{tensor.numel()} values of {tensor.dtype}"
            raise ValueError(
                f"{name}: {found}, but shape {tuple(quant_state.shape)} at blocksize {quant_state.blocksize} "
                f"needs {numel} of {dtype}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
