"""Tools to write CPU kernels: numba, bf16, an exponential, and a share of the work for each thread.

A kernel is a Python function of one argument, the array of its arguments as int64, that numba compiles for this
processor (once: the code is kept beside the source). Loops over `range(n)` of arrays that begin at 0 become vector
code. numba checks whether an index is negative, unless the index is the loop's own. The check prevents vector code.
"""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu import threads

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
# numba compiles anew if a kernel's file has changed, but knows nothing of this one: its state names the directory.
_CACHE = Path(__file__).parent / "__pycache__" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
# Sums may be reordered, products and sums fused; but NaN and infinity stay what they are.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

for _name, _address in threads.symbols().items():
    llvmlite.binding.add_symbol(_name, _address)
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


class Kernel:
    """A compiled kernel. A call takes tensors, the first argument, ints and floats, and returns when every thread is
    done. On tensors without memory (meta) it does nothing.

    Args:
        exact: nothing is reordered or fused.
        parallel: run on all threads; each does its `share`. Waking the threads takes as long as one thread needs for a
            small tensor.
    """

    def __init__(self, function: Callable, exact: bool = False, parallel: bool = True):
        self._run = threads.run if parallel else threads.run_alone
        signature = types.void(types.CPointer(types.int64))
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_CACHE)
        try:
            self._code = cfunc(signature, cache=True, fastmath=set() if exact else _FASTMATH, error_model="numpy")(
                function
            )
        finally:
            numba.config.CACHE_DIR = before

    def __call__(self, *arguments: torch.Tensor | int | float) -> None:
        if arguments[0].is_meta:
            return
        self._run(
            self._code.address,
            [a if type(a) is int else _bits(a) if type(a) is float else a.data_ptr() for a in arguments],
        )


def _bits(x: float) -> int:
    return struct.unpack("q", struct.pack("d", x))[0]


@intrinsic
def _pointer(typing, address):
    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), build


@njit(inline="always")
def arguments(pointer, count):
    """The kernel's arguments, int64 [count]."""
    return carray(pointer, count, np.int64)


@njit(inline="always")
def bf16s(address, first, count):
    """Elements first … first + count of the bf16 tensor at `address`, as uint16."""
    return carray(_pointer(address + 2 * first), count, np.uint16)


@njit(inline="always")
def floats(address, first, count):
    """The same of an fp32 tensor."""
    return carray(_pointer(address + 4 * first), count, np.float32)


@njit(inline="always")
def octets(address, first, count):
    """The same of a uint8 tensor."""
    return carray(_pointer(address + first), count, np.uint8)


@njit(inline="always")
def ints(address, first, count):
    """The same of an int64 tensor."""
    return carray(_pointer(address + 8 * first), count, np.int64)


@intrinsic
def number(typing, argument):
    """fp32 of a float among the arguments."""

    def build(context, builder, signature, args):
        return builder.fptrunc(builder.bitcast(args[0], ir.DoubleType()), _F32)

    return types.float32(types.int64), build


@intrinsic
def wide(typing, bits):
    """fp32 of a bf16."""

    def build(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), _F32)

    return types.float32(types.uint16), build


@intrinsic
def narrow(typing, x):
    """bf16 of an fp32, rounded to the nearest, halves to the even one, as PyTorch does."""

    def build(context, builder, signature, args):
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _I32(0x7FFF)), odd), _I32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, _I32(0x7FC0), rounded), _I16)

    return types.uint16(types.float32), build


@njit(inline="always")
def rounded(x):
    """fp32 x as bf16 has it."""
    return wide(narrow(x))


@intrinsic
def _floor(typing, x):
    def build(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.floor", [_F32]), args)

    return types.float32(types.float32), build


@intrinsic
def _two_to_the(typing, n):
    def build(context, builder, signature, args):
        exponent = builder.add(builder.fptosi(args[0], _I32), _I32(127))
        return builder.bitcast(builder.shl(exponent, _I32(23)), _F32)

    return types.float32(types.float32), build


@njit(inline="always")
def exp(x):
    """e^x in fp32 to 2 units in the last place; of less than -87 zero, of more than 88 infinity.

    2^n e^r with |r| ≤ ln 2 / 2, ln 2 in two parts, and a polynomial for e^r (Cephes, Moshier 1992).
    """
    bounded = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = _floor(bounded * np.float32(1.44269504088896341) + np.float32(0.5))
    r = bounded - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    p = p * _two_to_the(n)
    p = np.float32(np.inf) if x > np.float32(88.0) else p
    p = np.float32(0.0) if x < np.float32(-87.0) else p
    return p if x == x else x


@intrinsic
def larger(typing, x, y):
    """The larger of x and y. If one is NaN, either may be returned. This lets the compiler search for a maximum in
    vector code."""

    def build(context, builder, signature, args):
        maxnum = builder.module.declare_intrinsic("llvm.maxnum", [_F32], ir.FunctionType(_F32, [_F32, _F32]))
        return builder.call(maxnum, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), build


@njit(inline="always")
def thread():
    """The number of this thread, from 0."""
    return np.int64(_thread())


@njit(inline="always")
def share(n):
    """(first, behind the last) of n items that are this thread's."""
    count = np.int64(_threads())
    return n * thread() // count, n * (thread() + 1) // count
