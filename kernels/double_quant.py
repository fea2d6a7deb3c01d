"""Double quantization: the fp32 absmax of NF4 blocks in 8 bits.

    offset = mean(absmax)
    c      = nearest code of (absmax - offset) / nested_absmax in the signed dynamic map, blocks of 256
    absmax' = map[c] · nested_absmax + offset                     two roundings: never one fused multiply-add

Costs 8/64 + 32/(64·256) = 0.127 bits a weight at block 64 instead of 32/64 = 0.5. QLoRA, Dettmers et al. 2023, §3;
byte for byte bitsandbytes' `compress_statistics=True` on a CPU.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.codebook import NESTED_BLOCKSIZE


@torch.library.custom_op("qdora::quantize_absmax", mutates_args=())
def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantize_absmax(absmax)


@_quantize_absmax.register_fake
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested = -(-absmax.numel() // NESTED_BLOCKSIZE)
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(nested), absmax.new_empty(())


@torch.library.custom_op("qdora::dequantize_absmax", mutates_args=())
def _dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return reference.dequantize_absmax(codes, nested_absmax, nested_offset)


@_dequantize_absmax.register_fake
def _(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize block maxima to 8 bits.

    Args:
        absmax: fp32 [blocks].

    Returns:
        codes uint8 [blocks], nested_absmax fp32 [ceil(blocks / 256)], nested_offset fp32 [].

    Raises:
        ValueError: not fp32, or not one-dimensional.
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise ValueError(f"absmax must be float32 [blocks], not {absmax.dtype} {tuple(absmax.shape)}")
    return torch.ops.qdora.quantize_absmax(absmax.contiguous())


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """The fp32 [blocks] that `quantize_absmax` returned codes, nested_absmax and nested_offset for.

    Raises:
        ValueError: wrong dtype or number of values.
    """
    nested = -(-codes.numel() // NESTED_BLOCKSIZE)
    if codes.dtype != torch.uint8 or nested_absmax.dtype != torch.float32 or nested_absmax.numel() != nested:
        raise ValueError(
            f"codes must be uint8 and nested_absmax float32 [{nested}] for {codes.numel()} codes, "
            f"not {codes.dtype} and {nested_absmax.dtype} {tuple(nested_absmax.shape)}"
        )
    return torch.ops.qdora.dequantize_absmax(codes, nested_absmax, nested_offset)
