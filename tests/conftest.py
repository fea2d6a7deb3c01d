"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """Have Python's collector pass over what was imported, half a million objects that stay."""
    gc.collect()
    gc.freeze()
