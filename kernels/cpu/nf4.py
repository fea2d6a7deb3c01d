"""4-bit quantize and dequantize on a CPU: see kernels/nf4.py.

Each is one pass over whole blocks of fp32 or bf16. If bitsandbytes is installed, its compiled CPU routine dequantizes
NF4, in less time. The package itself is not imported. On loading, the routine's results are compared with the
definition for every level. If they differ, the routine is not used. One thing may differ: with AVX-512's conversion to
bf16 a value below the smallest normal number, 1.2e-38, is 0.
"""

import ctypes
import functools
import importlib.util
import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.codebook import decision_bounds, level_pairs, levels
from kernels.cpu import supports
from kernels.cpu.absmax import dequantize_absmax
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, floats, ints, larger, narrow, octets, share, wide
from kernels.op import supports_if
from kernels.weight import Weight, packed_sizes

_TINY = np.float32(1e-38)  # the least that bitsandbytes divides by
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_own = threading.local()  # what belongs to a thread: its buffer of each dtype


@njit(inline="always")
def _below(x, b):
    """How many of the 15 bounds are below x; of NaN all."""
    n = np.int32(not x <= b[0]) + np.int32(not x <= b[1]) + np.int32(not x <= b[2]) + np.int32(not x <= b[3])
    n += np.int32(not x <= b[4]) + np.int32(not x <= b[5]) + np.int32(not x <= b[6]) + np.int32(not x <= b[7])
    n += np.int32(not x <= b[8]) + np.int32(not x <= b[9]) + np.int32(not x <= b[10]) + np.int32(not x <= b[11])
    return n + np.int32(not x <= b[12]) + np.int32(not x <= b[13]) + np.int32(not x <= b[14])


@njit(inline="always")
def _fifteen(address):
    """The bounds, as values that stay in registers."""
    b = floats(address, 0, 15)
    return (b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14])


@njit(inline="always")
def _read(address, start, is_bf16, x):
    """Fill x with values of w from `start` on."""
    if is_bf16:
        halves = bf16s(address, start, x.size)
        for i in range(x.size):
            x[i] = wide(halves[i])
    else:
        singles = floats(address, start, x.size)
        for i in range(x.size):
            x[i] = singles[i]


@Kernel
def _quantize(pointer):
    # a: 0 w, 1 packed and 2 absmax (written), 3 bounds, 4 codes in the order of the levels, 5 blocks, 6 blocksize,
    #    7 whether the codes are in order, 8 whether w is bf16
    a = arguments(pointer, 9)
    blocks, blocksize, in_order, is_bf16 = a[5], a[6], a[7], a[8]
    bounds, codes = _fifteen(a[3]), octets(a[4], 0, 16)
    absmax = floats(a[2], 0, blocks)
    x, code = np.empty(blocksize, np.float32), np.empty(blocksize, np.uint8)
    first, behind = share(blocks)
    for block in range(first, behind):
        start = block * blocksize
        _read(a[0], start, is_bf16, x)
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


@functools.partial(Kernel, exact=True)  # a quotient is not a product with a reciprocal
def _encode(pointer):
    # a: 0 w, 1 packed (written), 2 scale of each block, 3 bounds, 4 codes in the order of the levels, 5 blocks,
    #    6 blocksize, 7 whether w is bf16
    a = arguments(pointer, 8)
    blocks, blocksize, is_bf16 = a[5], a[6], a[7]
    bounds, codes, scales = _fifteen(a[3]), octets(a[4], 0, 16), floats(a[2], 0, blocks)
    x, code = np.empty(blocksize, np.float32), np.empty(blocksize, np.uint8)
    first, behind = share(blocks)
    for block in range(first, behind):
        start, scale = block * blocksize, scales[block]
        _read(a[0], start, is_bf16, x)
        for i in range(blocksize):
            code[i] = np.uint8(_below(x[i] / scale, bounds))
        packed = octets(a[1], start // 2, blocksize // 2)
        for i in range(blocksize // 2):
            packed[i] = codes[code[2 * i]] << 4 | codes[code[2 * i + 1]]


def _whole_blocks(w: Tensor, blocksize: int) -> bool:
    return w.numel() > 0 and w.numel() % blocksize == 0 and (supports(w) or supports(w, dtype=torch.float32))


@supports_if(lambda w, scale, blocksize, quant_type: _whole_blocks(w, blocksize))
def encode_4bit(w: Tensor, scale: Tensor, blocksize: int, quant_type: str) -> Tensor:
    n_bytes, blocks = packed_sizes(w.numel(), blocksize)
    packed = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
    _encode(w, packed, scale, *decision_bounds(quant_type), blocks, blocksize, int(w.dtype == torch.bfloat16))
    return packed


@supports_if(lambda w, blocksize, quant_type: _whole_blocks(w, blocksize))
def quantize_4bit(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    n_bytes, blocks = packed_sizes(w.numel(), blocksize)
    packed = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(blocks, dtype=torch.float32, device="cpu")
    bounds, codes = decision_bounds(quant_type)
    in_order = int(torch.equal(codes, torch.arange(16, dtype=torch.uint8, device="cpu")))
    _quantize(w, packed, absmax, bounds, codes, blocks, blocksize, in_order, int(w.dtype == torch.bfloat16))
    return packed, absmax


@functools.cache
def _symbol(name: str, pointers: int, sizes: int) -> Callable[..., None] | None:
    """A function of the library that takes so many pointers, then so many sizes; None if there is none."""
    spec = importlib.util.find_spec("bitsandbytes")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob("libbitsandbytes_cpu.*"):
            try:
                function = getattr(ctypes.CDLL(str(path)), name)
            except (OSError, AttributeError):  # made for another machine; a version without it
                continue
            function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_longlong] * sizes
            function.restype = None
            return function
    return None


def _blocks(routine: Callable[..., None], packed: Tensor, absmax: Tensor, out: Tensor, blocksize: int) -> None:
    """Dequantize out.numel() values, whole blocks, into `out`."""
    blocks = out.numel() // blocksize
    row = math.gcd(blocks, 16)  # the routine takes rows of whole blocks: a few, or its outer loop costs time
    routine(packed.data_ptr(), absmax.data_ptr(), out.data_ptr(), blocksize, blocks // row, row * blocksize)


@functools.cache
def _routine(dtype: torch.dtype) -> Callable[..., None] | None:
    """routine(codes, absmax, out, blocksize, rows, values a row) if there is one that rounds level · absmax once."""
    routine = _symbol(f"cdequantize_blockwise_cpu_nf4_{_DTYPES[dtype]}", 3, 3)
    if routine is None:
        return None
    packed = torch.arange(256, dtype=torch.uint8, device="cpu").repeat(64)  # 512 blocks of 64: every pair of levels
    absmax = torch.logspace(-36, 38, 512, device="cpu")  # to overflow in fp16
    out = torch.empty(2 * packed.numel(), dtype=dtype, device="cpu")
    _blocks(routine, packed, absmax, out, 64)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    expected = (levels("nf4")[codes.int()].view(512, 64) * absmax[:, None]).to(dtype).view(-1)
    return routine if torch.equal(out.view(torch.uint8), expected.view(torch.uint8)) else None


@functools.partial(Kernel, exact=True)
def _decode(pointer):
    # a: 0 packed, 1 absmax, 2 the two levels of each byte, 3 out (written), 4 blocks, 5 blocksize,
    #    6 whether out is bf16
    a = arguments(pointer, 7)
    blocks, blocksize, is_bf16 = a[4], a[5], a[6]
    absmax, table = floats(a[1], 0, blocks), ints(a[2], 0, 256)
    pairs = np.empty(blocksize // 2, np.int64)
    level = pairs.view(np.float32)
    first, behind = share(blocks)
    for block in range(first, behind):
        start, scale = block * blocksize, absmax[block]
        packed = octets(a[0], start // 2, blocksize // 2)
        for i in range(blocksize // 2):
            pairs[i] = table[packed[i]]
        if is_bf16:
            halves = bf16s(a[3], start, blocksize)
            for i in range(blocksize):
                halves[i] = narrow(level[i] * scale)
        else:
            singles = floats(a[3], start, blocksize)
            for i in range(blocksize):
                singles[i] = level[i] * scale


def _supports(weight: Weight, dtype: torch.dtype) -> bool:
    n = weight.shape.numel()
    if n == 0 or n % weight.quant_state.blocksize or weight.values.is_meta:
        return False
    return dtype != torch.float16 or (weight.quant_state.quant_type == "nf4" and _routine(dtype) is not None)


def _dequantize(weight: Weight, out: Tensor) -> Tensor:
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_absmax(absmax, state.nested_absmax, state.nested_offset, state.quant_type)
    routine = _routine(out.dtype) if state.quant_type == "nf4" else None
    if routine is not None:
        _blocks(routine, weight.values, absmax, out, state.blocksize)
    else:
        is_bf16 = int(out.dtype == torch.bfloat16)
        _decode(weight.values, absmax, level_pairs(state.quant_type), out, len(absmax), state.blocksize, is_bf16)
    return out.view(state.shape)


@supports_if(_supports)
def dequantize_4bit(weight: Weight, dtype: torch.dtype) -> Tensor:
    return _dequantize(weight, torch.empty(weight.shape.numel(), dtype=dtype, device="cpu"))


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight in `dtype`. Read it before this thread calls `dense` again; that call may overwrite it.

    It lies in a buffer that stays in the processor's cache, so a training step's memory has no holes from it. A dense
    weight must have this dtype and is returned as it is.
    """
    if not weight.packed:
        return weight.values
    if _supports(weight, dtype):
        return _dequantize(weight, _buffer(weight.shape.numel(), dtype))
    return weight.dense(dtype)


def _buffer(n: int, dtype: torch.dtype) -> Tensor:
    buffer = getattr(_own, _DTYPES[dtype], None)
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):  # or it could only be used there
            buffer = torch.empty(n, dtype=dtype, device="cpu")
        setattr(_own, _DTYPES[dtype], buffer)
    return buffer[:n]
