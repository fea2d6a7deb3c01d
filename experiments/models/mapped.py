"""A model's parameters, cast one by one out of the file that is mapped into memory.

transformers maps a safetensors file and hands its tensors out as they lie there; asked for another dtype it has the
whole file in memory beside all that was cast. Here the pages of a parameter are let go once it is cast.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MADV_DONTNEED = 4


def stored_dtypes(directory: Path) -> dict[str, str]:
    """Of each tensor in the directory's safetensors files its dtype, in their words: F32, BF16, I8 …"""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            found |= {name: file.get_slice(name).get_dtype() for name in names}
    return found


def stored_dtype(directory: Path) -> torch.dtype | None:
    """The float dtype of all tensors in the directory's safetensors files; None if they differ."""
    found = {*stored_dtypes(directory).values()}
    return _DTYPES.get(found.pop()) if len(found) == 1 else None


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast each parameter of `model` to `dtype`."""
    ranges = _mapped_files()
    for parameter in model.parameters():
        stored = parameter.data
        parameter.data = stored.to(dtype)
        _let_go(stored, ranges)
    model.config.dtype = dtype


def _mapped_files() -> list[tuple[int, int]]:
    """(first, last + 1) address of each mapping of a safetensors file."""
    if sys.platform != "linux":
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = (line.split()[0].split("-") for line in lines if line.endswith(".safetensors"))
    return [(int(first, 16), int(stop, 16)) for first, stop in spans]


def _let_go(tensor: Tensor, ranges: list[tuple[int, int]]) -> None:
    """Drop the pages of a file that lie wholly within `tensor`; a later read gets them from the file again."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    if any(first <= start and stop <= last for first, last in ranges):
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)
