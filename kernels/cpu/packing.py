"""Four-bit codes of the blocks of a weight, and the scales of the blocks."""

import functools

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, decision_bounds, dynamic_map
from kernels.cpu.code import Kernel, arguments, bf16s, floats, larger, octets, share, wide

_TINY = np.float32(1e-38)  # the least that bitsandbytes divides by


@njit(inline="always")
def _below(x, b):
    """How many of the 15 bounds are below x; of NaN all."""
    n = np.int32(not x <= b[0]) + np.int32(not x <= b[1]) + np.int32(not x <= b[2]) + np.int32(not x <= b[3])
    n += np.int32(not x <= b[4]) + np.int32(not x <= b[5]) + np.int32(not x <= b[6]) + np.int32(not x <= b[7])
    n += np.int32(not x <= b[8]) + np.int32(not x <= b[9]) + np.int32(not x <= b[10]) + np.int32(not x <= b[11])
    return n + np.int32(not x <= b[12]) + np.int32(not x <= b[13]) + np.int32(not x <= b[14])


@Kernel
def _quantize(pointer):
    a = arguments(pointer, 9)
    blocks, blocksize, in_order, is_bf16 = a[5], a[6], a[7], a[8]
    memory, codes = floats(a[3], 0, 15), octets(a[4], 0, 16)
    bounds = (
        *(memory[0], memory[1], memory[2], memory[3], memory[4], memory[5], memory[6], memory[7]),
        *(memory[8], memory[9], memory[10], memory[11], memory[12], memory[13], memory[14]),
    )
    absmax = floats(a[2], 0, blocks)
    x, code = np.empty(blocksize, np.float32), np.empty(blocksize, np.uint8)
    first, behind = share(blocks)
    for block in range(first, behind):
        start = block * blocksize
        if is_bf16:
            halves = bf16s(a[0], start, blocksize)
            for i in range(blocksize):
                x[i] = wide(halves[i])
        else:
            singles = floats(a[0], start, blocksize)
            for i in range(blocksize):
                x[i] = singles[i]
        largest, no_number = np.float32(0.0), np.int32(0)
        for i in range(blocksize):
            largest = larger(largest, abs(x[i]))
            no_number |= np.int32(x[i] != x[i])
        if no_number:
            largest = np.float32(np.nan)
        absmax[block] = largest
        scale = np.float32(1.0) / (_TINY if largest < _TINY else largest)
        for i in range(blocksize):
            code[i] = np.uint8(_below(x[i] * scale, bounds))
        if not in_order:
            for i in range(blocksize):
                code[i] = codes[code[i]]
        packed = octets(a[1], start // 2, blocksize // 2)
        for i in range(blocksize // 2):
            packed[i] = code[2 * i] << 4 | code[2 * i + 1]


def quantize(w: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str) -> None:
    """Pack w, fp32 or bf16 [n] of whole blocks, into packed uint8 [n / 2] and absmax fp32 [blocks]."""
    bounds, codes = decision_bounds(quant_type)
    in_order = int(torch.equal(codes, torch.arange(16, dtype=torch.uint8)))
    _quantize(w, packed, absmax, bounds, codes, len(absmax), blocksize, in_order, int(w.dtype == torch.bfloat16))


@functools.partial(Kernel, exact=True, parallel=False)
def _dequantize_absmax(pointer):
    a = arguments(pointer, 6)
    n, offset = a[5], floats(a[3], 0, 1)[0]
    levels = floats(a[0], 0, 256)
    for block in range(-(-n // NESTED_BLOCKSIZE)):
        start = block * NESTED_BLOCKSIZE
        count = min(NESTED_BLOCKSIZE, n - start)
        codes, absmax = octets(a[1], start, count), floats(a[4], start, count)
        scale = floats(a[2], block, 1)[0]
        for i in range(count):
            absmax[i] = levels[codes[i]] * scale + offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """The fp32 scales that uint8 codes [n] in blocks of 256 stand for; nested_absmax fp32 [blocks], offset fp32 []."""
    absmax = torch.empty_like(codes, dtype=torch.float32)
    _dequantize_absmax(dynamic_map("cpu"), codes, nested_absmax, offset, absmax, codes.numel())
    return absmax
