"""Double quantization in Triton. kernels/absmax.py has the formula and the format.

A program handles one nested block of 256 values. Quantizing reads absmax once, dequantizing the codes once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, absmax_map, dynamic_codes
from kernels.triton.case import Case, meta
from kernels.triton.launch import launch
from kernels.weight import nested_blocks

_NESTED = tl.constexpr(NESTED_BLOCKSIZE)
NUM_WARPS = 1  # 8 values a thread, and all of it is 1/64 or less of a 4-bit tensor's work


@triton.jit
def load_absmax(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, live, BLOCKS: tl.constexpr
):  # fp32 [BLOCKS]
    """absmax of blocks first … first + BLOCKS - 1, dequantized if nested_absmax_ptr is not None.

    Those from `live` on are not read and get any number. They must not cross a nested block: BLOCKS divides 256 and
    first is a multiple of BLOCKS.
    """
    block = tl.arange(0, BLOCKS)
    if nested_absmax_ptr is None:
        return tl.load(absmax_ptr + first + block, mask=block < live, other=0.0)
    else:
        code = tl.load(absmax_ptr + first + block, mask=block < live, other=0).to(tl.int32)
        nested_absmax = tl.load(nested_absmax_ptr + first // _NESTED, mask=live > 0, other=0.0)
        return tl.load(map_ptr + code) * nested_absmax + tl.load(nested_offset_ptr)


@triton.jit
def load_row_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, block, mask):  # fp32, block's shape
    """absmax of any blocks (int64), dequantized if nested_absmax_ptr is not None; 0 or the offset where masked."""
    if nested_absmax_ptr is None:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested_absmax = tl.load(nested_absmax_ptr + block // _NESTED, mask=mask, other=0.0)
        return tl.load(map_ptr + code) * nested_absmax + tl.load(nested_offset_ptr)


@triton.jit
def _quantize_absmax_kernel(
    absmax_ptr,  # fp32 [n]
    offset_ptr,  # fp32 []
    code_of_point_ptr,  # u8 [65536]
    codes_ptr,  # u8 [n]
    nested_absmax_ptr,  # fp32 [ceil(n / 256)]
    n: tl.int64,
):
    block = tl.program_id(0).to(tl.int64)
    i = block * _NESTED + tl.arange(0, _NESTED)
    x = tl.load(absmax_ptr + i, mask=i < n, other=0.0) - tl.load(offset_ptr)
    x = tl.where(i < n, x, 0.0)
    nested_absmax = tl.max(tl.where(x == x, tl.abs(x), 0.0), axis=0)  # a NaN does not count
    scaled = x * tl.math.div_rn(1.0, nested_absmax)
    point = (tl.minimum(tl.maximum(scaled, -1.0), 1.0) + 1.0) * 32767.5 + 0.5
    point = tl.where(scaled == scaled, point, 0.0).to(tl.int32)  # 0 · inf of a block of zeros is NaN: point 0
    tl.store(codes_ptr + i, tl.load(code_of_point_ptr + point), mask=i < n)
    tl.store(nested_absmax_ptr + block, nested_absmax)


@triton.jit
def _dequantize_absmax_kernel(
    codes_ptr,  # u8 [n]
    nested_absmax_ptr,  # fp32 [ceil(n / 256)]
    nested_offset_ptr,  # fp32 []
    map_ptr,  # fp32 [256]
    absmax_ptr,  # fp32 [n]
    n: tl.int64,
):
    first = tl.program_id(0).to(tl.int64) * _NESTED
    i = tl.arange(0, _NESTED)
    absmax = load_absmax(codes_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, n - first, _NESTED)
    tl.store(absmax_ptr + first + i, absmax, mask=i < n - first)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, device = absmax.numel(), absmax.device
    programs = nested_blocks(n)
    offset = absmax.mean()  # torch's own sum: the same number as the reference's on that device
    codes = torch.empty(n, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(programs, dtype=torch.float32, device=device)
    args = (absmax, offset, dynamic_codes(device), codes, nested_absmax, n)
    launch(_quantize_absmax_kernel, (programs,), *args, num_warps=NUM_WARPS, fp_fusion=False)
    return codes, nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, quant_type: str) -> Tensor:
    n, device = codes.numel(), codes.device
    absmax = torch.empty(n, dtype=torch.float32, device=device)
    args = (codes, nested_absmax, nested_offset, absmax_map(quant_type, device), absmax, n)
    launch(_dequantize_absmax_kernel, (nested_blocks(n),), *args, num_warps=NUM_WARPS, fp_fusion=False)
    return absmax


def _case(kernel: str, fn, call) -> Case:
    return Case(
        kernel=kernel,
        config="b256",
        call=call,
        fn=fn,
        values=NESTED_BLOCKSIZE,
        bytes_per_value=4 + 1 + 4 / NESTED_BLOCKSIZE,
        max_registers=64,
    )


_CODES = (meta(2**18, dtype=torch.uint8), meta(2**10), meta())

CASES = [
    _case("absmax_quantize", _quantize_absmax_kernel, lambda: quantize_absmax(meta(2**18))),
    _case("absmax_dequantize", _dequantize_absmax_kernel, lambda: dequantize_absmax(*_CODES, "nf4")),
]
