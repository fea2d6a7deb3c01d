"""The memory that a function takes on a CPU."""

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile


def highest(function: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator has given out while `function` runs, above those before. Memory of Python
    and of libraries themselves does not count."""
    gc.collect()  # what is freed while `function` runs must be its own
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def highest_of_new_thread(function: Callable[[], Any]) -> int:
    """The same in a thread of its own, which has no buffers from calls before (kernels/cpu/nf4.py keeps one)."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(highest(function)))
    thread.start()
    thread.join()
    return found[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep messages of the profiler's library off the terminal; it ignores log levels."""
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)
