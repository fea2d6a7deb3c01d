"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import gc
import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A shell has what it starts in the background ignore SIGINT, and so would the runs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Have Python's collector pass over what was imported, half a million objects that stay."""
    gc.collect()
    gc.freeze()
