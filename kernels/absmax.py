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

A block format of codebook.py has 8-bit scales by its own rule. They are kept as a double-quantized absmax is, so that
every kernel reads them alike: map[c] is the 8-bit float that has c as its byte, and

    MXFP4   scale_b = 2^(⌊log₂ max |w_i|⌋ - 2)                               nested_absmax 1, offset 0
    NVFP4   nested_absmax = max |w| / (6 · 448)                              of the whole tensor, offset 0
            scale_b = E4M3 of max |w_i| / (6 · nested_absmax), 2⁻⁹ at least

MXFP4's rule is OCP's (Microscaling Formats 1.0, §6.3); 4 = 2² is the largest power of two among the levels. NVFP4's is
ModelOpt's, a block of zeros has scale 1 as there. An infinity or a NaN makes a block of MXFP4 NaN, all of NVFP4.

Memory layout: absmax [blocks], codes [blocks] and nested_absmax [ceil(blocks / 256)] are flat and contiguous.
"""

import math

import torch
from torch import Tensor

from kernels.codebook import BLOCK_FORMATS
from kernels.op import define_op
from kernels.weight import nested_blocks


@define_op
def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested_absmax = absmax.new_empty(nested_blocks(absmax.numel()))
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), nested_absmax, absmax.new_empty(())


@define_op
def _dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, quant_type: str) -> Tensor:
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


def quantize_scales(w: Tensor, quant_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """The scales of the blocks of `w` in a block format.

    Args:
        w: any float dtype and shape, contiguous.
        quant_type: a key of `kernels.codebook.BLOCK_FORMATS`.

    Returns:
        codes uint8 [blocks], nested_absmax fp32 [ceil(blocks / 256)], nested_offset fp32 [].
    """
    form, values = BLOCK_FORMATS[quant_type], w.view(-1)
    full = values.numel() // form.blocksize * form.blocksize
    parts = [values[:full].view(-1, form.blocksize), values[full:].view(1, -1)][: 1 if full == values.numel() else 2]
    largest = torch.cat([part.abs().amax(dim=1) for part in parts]).float()  # [blocks]
    top = max(form.levels)
    nested = largest.new_ones(())
    if form.per_tensor:
        finest = torch.finfo(form.scale_dtype)
        size = largest.amax() if len(largest) else nested
        nested = torch.where(size == 0, 1.0, size / (top * finest.max))
        scale = torch.where(largest == 0, 1.0, largest / (top * nested))
        codes = scale.clamp(finest.smallest_normal * finest.eps, finest.max).to(form.scale_dtype).view(torch.uint8)
    else:
        exponent = largest.view(torch.int32) >> 23  # biased by 127, as E8M0 has it; 255 of infinity and NaN
        codes = torch.where(exponent == 255, 255, (exponent - math.frexp(top)[1] + 1).clamp(min=0)).to(torch.uint8)
    return codes, nested.repeat(nested_blocks(len(codes))), torch.zeros_like(nested)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, quant_type: str = "nf4") -> Tensor:
    """The fp32 [blocks] that `quantize_absmax` returned codes, nested_absmax and nested_offset for.

    Args:
        quant_type: the data type whose absmax it is: a block format has a map of its own.

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
    return _dequantize_absmax(codes, nested_absmax, nested_offset, quant_type)
