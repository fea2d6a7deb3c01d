"""Run machine code on the threads that PyTorch computes with.

PyTorch's threads keep spinning after each loop, so a second pool would wait for them. The code therefore runs in a
parallel region of PyTorch's OpenMP library. It calls `GOMP_parallel`, as a compiled `#pragma omp parallel` does (GNU
libgomp's ABI).

Threads that wait for one another spin for milliseconds before they sleep. Alone on two cores that is the fastest.
Beside one other process a training step then takes 36 times as long, because a spinning thread has the core that a
working one needs. `share_cores` has them sleep early as long as others need the cores. The number of threads stays,
and with it every bit of the results.
"""

import contextlib
import ctypes
import functools
import threading
import time
from pathlib import Path

import torch

from kernels.cpu.others import OthersLoad, crowded

SECONDS_BETWEEN_LOOKS = 0.5
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


def _rehearse(size: int) -> None:
    """Start `size` threads at once, and end them: where there is no room for their stacks libgomp ends the process.

    Raises:
        RuntimeError: there is no room.
    """
    release, begun = threading.Event(), []
    try:
        for _ in range(size):
            thread = threading.Thread(target=release.wait, name="rehearsal", daemon=True)
            thread.start()
            begun.append(thread)
    finally:
        release.set()
        for thread in begun:
            thread.join()


class _IdleThreads:
    """While they are `held`, OpenMP has more threads than there are CPUs, and all its threads sleep after 100 turns of
    waiting instead of 300,000: libgomp's manual, GOMP_SPINCOUNT."""

    def __init__(self):
        self._release: threading.Event | None = None

    @property
    def held(self) -> bool:
        return self._release is not None

    def hold(self, held: bool) -> None:
        if held == self.held:
            return
        if not held:
            self._release.set()  # the thread ends, and its team with it
            self._release = None
            return
        size = _library().omp_get_num_procs() + 1
        _rehearse(size)
        release, started = threading.Event(), threading.Event()
        self.thread = threading.Thread(
            target=self._team, args=(size, release, started), name="idle OpenMP", daemon=True
        )
        self.thread.start()
        started.wait()
        self._release = release

    @staticmethod
    def _team(size: int, release: threading.Event, started: threading.Event) -> None:
        try:
            nothing = symbols()["omp_get_num_threads"]  # a team has to call something
            _parallel()(nothing, None, size, 0)
        finally:
            started.set()
        release.wait()


_idle = _IdleThreads()


def _look_after_others() -> None:
    load = OthersLoad()
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        with contextlib.suppress(MemoryError, RuntimeError):  # no room for more threads: those that are there spin on
            _idle.hold(crowded(load.cores(), torch.get_num_threads()))


@functools.cache  # once a process
def share_cores() -> None:
    """From now on PyTorch's threads sleep early when they wait, but only while other processes need the cores."""
    if available():
        threading.Thread(target=_look_after_others, name="look after others", daemon=True).start()
