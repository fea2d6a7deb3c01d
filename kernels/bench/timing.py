"""The time that functions take. Their repetitions alternate, so that a busy moment hits all of them.

`times` calls a function as a program does: the time of a short op is then the host's. `graph_times` has a CUDA graph of
it, which the GPU runs without the host.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton import testing

MIN_ROUNDS = 5
CUDA_ROUNDS = 3
GRAPH_CALLS = 10  # of the function in one graph: so often that the start of a graph does not matter
FLUSH_BYTES = 2**28  # written between two calls: past every L2 cache


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


def graph_times(functions: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds of a function in a CUDA graph with a cold L2 cache: samples of every function, none if it has no graph.

    A graph flushes the cache before each call. The time of a graph that only flushes is subtracted.
    """
    cache = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    flushes = _graph(lambda: None, cache)
    graphs = [_graph(function, cache) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < MIN_ROUNDS:
        rounds += 1
        alone = _replay_seconds(flushes)
        for graph, sample in zip(graphs, samples):
            if graph is not None:
                sample.append(per_call(_replay_seconds(graph), alone))
    return samples


def per_call(graph: float, flushes: float) -> float:
    """Seconds of one call, of a graph's seconds and of those of its flushes alone."""
    return max(graph - flushes, 1e-9) / GRAPH_CALLS


def _graph(function: Callable[[], Any], cache: torch.Tensor) -> torch.cuda.CUDAGraph | None:
    """None if the function cannot be captured, as one that waits for the GPU cannot."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()  # its first call on this stream makes what capture may not
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH_CALLS):
                cache.zero_()
                function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
