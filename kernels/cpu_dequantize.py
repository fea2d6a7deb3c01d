"""bitsandbytes' compiled CPU routine behind NF4 dequantize, where that package is installed; it is not imported.

The format is the same, and so are the results, bit for bit: a routine is compared with the torch twin on every level
when it is loaded, and is left alone if it differs, or is not there. One thing may differ: with AVX-512's conversion to
bf16 a value below the smallest normal number, 1.2e-38, is 0. The routine takes whole blocks of NF4; the rest of a
tensor, other data types and other devices are the twin's (reference.py).
"""

import ctypes
import functools
import importlib.util
import math
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels import reference

_own = threading.local()  # what belongs to a thread: its buffer of each dtype
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


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
    """routine(codes, absmax, out, blocksize, rows, values a row) if there is one that does what the twin does."""
    routine = _symbol(f"cdequantize_blockwise_cpu_nf4_{_DTYPES[dtype]}", 3, 3)
    if routine is None:
        return None
    packed = torch.arange(256, dtype=torch.uint8, device="cpu").repeat(64)  # 512 blocks of 64: every pair of levels
    absmax = torch.logspace(-36, 38, 512, device="cpu")  # to overflow in fp16
    out = torch.empty(2 * packed.numel(), dtype=dtype, device="cpu")
    _blocks(routine, packed, absmax, out, 64)
    expected = reference.dequantize_4bit(packed, absmax, None, None, 64, "nf4", [out.numel()], dtype)
    return routine if torch.equal(out.view(torch.uint8), expected.view(torch.uint8)) else None


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    reuse: bool = False,
) -> Tensor:
    """`reference.dequantize_4bit`, by the routine as far as it goes.

    Args:
        reuse: the result may lie in a buffer that the thread's next call overwrites. The buffer stays in the
            processor's cache, and leaves no holes between what a training step keeps.
    """
    routine = _routine(dtype) if packed.is_cpu and quant_type == "nf4" else None
    n = torch.Size(shape).numel()
    full = n // blocksize * blocksize
    if routine is None or full == 0:
        return reference.dequantize_4bit(
            packed, absmax, nested_absmax, nested_offset, blocksize, quant_type, shape, dtype
        )
    if nested_absmax is not None:
        absmax = reference.dequantize_absmax(absmax, nested_absmax, nested_offset)
    flat = _buffer(n, dtype) if reuse else torch.empty(n, dtype=dtype, device=packed.device)
    packed = packed.view(-1)
    _blocks(routine, packed, absmax, flat if full == n else flat[:full], blocksize)
    if full < n:
        rest = (packed[full // 2 :], absmax[-1:], None, None, blocksize, quant_type, [n - full], dtype)
        flat[full:] = reference.dequantize_4bit(*rest)
    return flat.view(shape)


def _buffer(n: int, dtype: torch.dtype) -> Tensor:
    buffer = getattr(_own, _DTYPES[dtype], None)
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):  # or it could only be used there
            buffer = torch.empty(n, dtype=dtype, device="cpu")
        setattr(_own, _DTYPES[dtype], buffer)
    return buffer[:n]
