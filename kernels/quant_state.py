"""What belongs to packed 4-bit codes: QuantState, and the checks that codes and state fit together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.codebook import BLOCKSIZES, CODEBOOKS
from kernels.double_quant import nested_blocks

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # dtypes that can be quantized and dequantized to


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
        quant_type: the 4-bit data type, a key of `kernels.codebook.CODEBOOKS`.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    quant_type: str = "nf4"

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tensors in the order in which ops take them."""
        return self.absmax, self.nested_absmax, self.nested_offset


def check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")


def check_quant_type(quant_type: str) -> None:
    if quant_type not in CODEBOOKS:
        raise ValueError(f"quant_type {quant_type!r} is not one of {', '.join(CODEBOOKS)}")


def packed_sizes(n: int, blocksize: int) -> tuple[int, int]:
    """(bytes of codes, blocks) for n values."""
    return -(-n // 2), -(-n // blocksize)


def check_packed(packed: Tensor, quant_state: QuantState) -> None:
    """Raise ValueError if `packed` and `quant_state` do not belong together."""
    check_blocksize(quant_state.blocksize)
    check_quant_type(quant_state.quant_type)
    n_bytes, blocks = packed_sizes(quant_state.shape.numel(), quant_state.blocksize)
    expected = [
        ("packed", packed, torch.uint8, n_bytes),
        ("absmax", quant_state.absmax, torch.uint8 if quant_state.nested else torch.float32, blocks),
    ]
    if quant_state.nested:
        expected += [
            ("nested_absmax", quant_state.nested_absmax, torch.float32, nested_blocks(blocks)),
            ("nested_offset", quant_state.nested_offset, torch.float32, 1),
        ]
    elif quant_state.nested_offset is not None:
        raise ValueError("nested_offset is given without nested_absmax")
    for name, tensor, dtype, numel in expected:
        if tensor is None or tensor.dtype != dtype or tensor.numel() != numel:
            found = "nothing" if tensor is None else f"{tensor.numel()} values of {tensor.dtype}"
            raise ValueError(
                f"{name}: {found}, but shape {tuple(quant_state.shape)} at blocksize {quant_state.blocksize} "
                f"needs {numel} of {dtype}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        if tensor.device != packed.device:
            raise ValueError(f"{name} is on {tensor.device} but packed on {packed.device}")
