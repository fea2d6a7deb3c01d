"""The time that functions take. Their repetitions alternate, so that a busy moment hits all of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton import testing

MIN_ROUNDS = 5
CUDA_ROUNDS = 3


def times(functions: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds of every repetition of every function, for about `seconds` in all. Each must have run once before.

    On a CPU, data stays in its caches from one repetition to the next. On CUDA `do_bench` flushes L2 in between.
    """
    if device.type == "cuda":
        milliseconds = 1000 * seconds / (CUDA_ROUNDS * len(functions))
        samples = [[] for _ in functions]
        for _ in range(CUDA_ROUNDS):
            for function, sample in zip(functions, samples):
                sample += testing.do_bench(function, warmup=milliseconds / 4, rep=milliseconds, return_mode="all")
        return [[t / 1000 for t in sample] for sample in samples]

    samples = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < MIN_ROUNDS:
        for function, sample in zip(functions, samples):
            start = time.perf_counter()
            function()
            sample.append(time.perf_counter() - start)
    return samples
