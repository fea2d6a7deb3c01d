"""Double quantization in plain torch: see kernels/absmax.py."""

import torch
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, absmax_map, dynamic_codes


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    n = absmax.numel()
    x = torch.nn.functional.pad(absmax - offset, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    nested_absmax = x.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1)
    scaled = (x * (1.0 / nested_absmax).unsqueeze(1)).clamp(-1, 1)
    point = ((scaled + 1) * 32767.5 + 0.5).nan_to_num(nan=0.0).int()  # 0 · inf of a block of zeros is NaN: point 0
    codes = dynamic_codes(absmax.device).index_select(0, point.view(-1)[:n])
    return codes, nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, quant_type: str) -> Tensor:
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return absmax_map(quant_type, codes.device).index_select(0, codes.int()) * scale + nested_offset
