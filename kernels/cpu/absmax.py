"""Double quantization on a CPU: see kernels/absmax.py."""

import functools

import torch
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, absmax_map
from kernels.cpu import supports
from kernels.cpu.numba_tools import Kernel, arguments, floats, octets
from kernels.op import supports_if


@functools.partial(Kernel, exact=True, parallel=False)
def _dequantize_absmax(pointer):
    # a: 0 map, 1 codes, 2 nested_absmax, 3 nested_offset, 4 absmax (written), 5 number of values
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


@supports_if(
    lambda codes, nested_absmax, nested_offset, _: (
        supports(codes, dtype=torch.uint8) and supports(nested_absmax, nested_offset, dtype=torch.float32)
    )
)
def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, quant_type: str) -> Tensor:
    absmax = torch.empty_like(codes, dtype=torch.float32)
    _dequantize_absmax(absmax_map(quant_type), codes, nested_absmax, nested_offset, absmax, codes.numel())
    return absmax
