"""4-bit quantize and dequantize in plain torch: see kernels/nf4.py."""

import torch
from torch import Tensor

from kernels.codebook import bin_table, decision_bounds, level_pairs
from kernels.reference.absmax import dequantize_absmax
from kernels.weight import Weight

_CHUNK = 2**18  # values, whole blocks of any size: the temporaries between w and its codes stay in a CPU's cache


def quantize_4bit(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    x = w.reshape(-1)
    n, full = x.numel(), x.numel() // blocksize * blocksize
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=w.device)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    # bitsandbytes multiplies full blocks by 1/absmax but divides the partial last one, and there alone stores
    # 1e-38 for an all-zero block. Codes on a decision bound depend on it, so we do the same.
    for start in range(0, full, _CHUNK):
        blocks = x[start : min(start + _CHUNK, full)].float().view(-1, blocksize)
        largest = absmax[start // blocksize : start // blocksize + len(blocks)]
        torch.amax(blocks.abs(), dim=1, out=largest)
        scaled = blocks * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)
        packed[start // 2 : (start + blocks.numel()) // 2] = _packed_codes(scaled.view(-1), quant_type)
    if full < n:
        tail = x[full:].float()
        absmax[-1] = tail.abs().amax().clamp(min=1e-38)
        scaled = torch.nn.functional.pad(tail / absmax[-1], (0, tail.numel() % 2))
        packed[full // 2 :] = _packed_codes(scaled, quant_type)
    return packed, absmax


def _packed_codes(scaled: Tensor, quant_type: str) -> Tensor:
    """Codes of the levels nearest to fp32 values in [-1, 1] or NaN, which gets the last; two in a byte; overwrites."""
    table, bounds, scale = bin_table(quant_type, scaled.device)
    scaled.nan_to_num_(nan=1.0)
    bins = (scaled * scale).add_(scale + 0.5).int()  # rounds to the nearest, all being positive
    shift = bounds.index_select(0, bins).sub_(scaled).view(torch.int32) >> 31 & 8  # 8 where x > bound: the sign
    codes = (table.index_select(0, bins) >> shift).to(torch.uint8).view(torch.int16)  # the even one in the low byte
    return (codes << 4 | codes >> 8).to(torch.uint8)


def encode_4bit(w: Tensor, scale: Tensor, blocksize: int, quant_type: str) -> Tensor:
    n = w.numel()
    bounds, codes = decision_bounds(quant_type, w.device)
    blocks = torch.nn.functional.pad(w.reshape(-1).float(), (0, -n % blocksize)).view(-1, blocksize)
    code = codes.index_select(0, torch.bucketize(blocks / scale.unsqueeze(1), bounds, out_int32=True).view(-1))
    return (code[::2] << 4 | code[1::2])[: (n + 1) // 2]


def dequantize_4bit(weight: Weight, dtype: torch.dtype) -> Tensor:
    packed, state = weight.values, weight.quant_state
    absmax, blocksize = state.absmax, state.blocksize
    if state.nested:
        absmax = dequantize_absmax(absmax, state.nested_absmax, state.nested_offset, state.quant_type)
    n = state.shape.numel()
    pairs = level_pairs(state.quant_type, packed.device).index_select(0, packed.reshape(-1).int())
    w = pairs.view(torch.float32)[:n]
    full = n // blocksize * blocksize
    blocks = w[:full].view(-1, blocksize)
    blocks *= absmax[: full // blocksize].unsqueeze(1)
    if full < n:
        w[full:] *= absmax[-1]
    return w.view(state.shape).to(dtype)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight in `dtype`; of a dense weight, which must have this dtype, the weight itself."""
    return dequantize_4bit(weight, dtype) if weight.packed else weight.values
