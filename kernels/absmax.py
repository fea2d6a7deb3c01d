"""Double quantization: the fp32 absmax of 4-bit blocks in 8 bits.

    offset  = mean(absmax)
    nested_absmax_b = max |absmax_i - offset| over block b of 256
    c_i     = code of (absmax_i - offset) / nested_absmax_b in the signed dynamic map
    absmax' = map[c] · nested_absmax + offset                     two roundings: never one fused multiply-add

Costs 8/64 + 32/(64·256) = 0.127 bits a weight at block 64 instead of 32/64 = 0.5. QLoRA, Dettmers et al. 2023, §3;
byte for byte bitsandbytes' `compress_statistics=True` on an x86 CPU (see `codebook.dynamic_codes`).

Special values follow bitsandbytes. A block whose values are all the mean has nested_absmax 0 and codes 0. An
infinity or a NaN in absmax makes the offset inf or NaN, so that every absmax dequantizes to NaN: the tensor is lost,
and visibly so.

Memory layout: absmax [blocks], codes [blocks] and nested_absmax [ceil(blocks / 256)] are flat and contiguous.
"""

import torch
from torch import Tensor

from kernels.op import define_op
from kernels.weight import nested_blocks


@define_op
def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested_absmax = absmax.new_empty(nested_blocks(absmax.numel()))
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), nested_absmax, absmax.new_empty(())


@define_op
def _dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
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
    return _quantize_absmax(absmax.contiguous())


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """The fp32 [blocks] that `quantize_absmax` returned codes, nested_absmax and nested_offset for.

    Raises:
        ValueError: wrong dtype, number of dimensions or number of values, or not contiguous.
    """
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.uint8, (codes.numel(),)),
        ("nested_absmax", nested_absmax, torch.float32, (nested_blocks(codes.numel()),)),
        ("nested_offset", nested_offset, torch.float32, ()),
    ):
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(shape)} for {codes.numel()} codes, "
                f"not {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    return _dequantize_absmax(codes, nested_absmax, nested_offset)
