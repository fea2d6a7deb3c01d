"""Run machine code on the threads that PyTorch computes with.

A second pool of threads would wait for the first one's, which keep spinning for a while after each of their loops. So
the code runs in a parallel region of PyTorch's own OpenMP library: what a compiler makes of `#pragma omp parallel` is
one call of `GOMP_parallel` (GNU libgomp's ABI).
"""

import ctypes
import functools
from pathlib import Path

import torch

IN_REGION = ("omp_get_thread_num", "omp_get_num_threads")  # what the code may call


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(found[0])) if found else None


def available() -> bool:
    """True if PyTorch brings libgomp, as its wheels for Linux do."""
    return _library() is not None


def symbols() -> dict[str, int]:
    """The addresses of the functions IN_REGION."""
    return {name: ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value for name in IN_REGION}


@functools.cache
def _parallel() -> ctypes._CFuncPtr:
    parallel = _library().GOMP_parallel
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


def run(address: int, arguments: list[int]) -> None:
    """Call the C function void f(int64_t *arguments) at `address` once on each of PyTorch's threads."""
    _parallel()(address, (ctypes.c_int64 * len(arguments))(*arguments), torch.get_num_threads(), 0)


@functools.cache
def _function(address: int) -> ctypes._CFuncPtr:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def run_alone(address: int, arguments: list[int]) -> None:
    """Call it on this thread alone."""
    _function(address)((ctypes.c_int64 * len(arguments))(*arguments))
