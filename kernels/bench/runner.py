"""Measure a benchmark: check the result of every provider, then time the providers that are right."""

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from kernels.bench.machine import Machine
from kernels.bench.memory import highest_of_new_thread
from kernels.bench.spec import Bench, Unavailable
from kernels.bench.timing import graph_times, times


@dataclass(frozen=True)
class Row:
    """One provider at one size: a line of the CSV, whose columns are these, in this order.

    Attributes:
        metric: time_ns, or graph_ns: of a call in a CUDA graph (timing.py).
        x: the size, in the benchmark's unit.
        p20, p50, p80: quantiles of the metric over the repetitions.
        bytes, flops: the least that must be moved and computed.
        roofline_share: the least time these take on this machine / p50. Above 1: data stayed in a cache.
        config, versions: JSON.
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    x: int
    p20: float
    p50: float
    p80: float
    bytes: int
    flops: int
    roofline_share: float
    config: str
    device: str
    versions: str
    commit: str


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Case:
    """The outcome of one size and configuration: rows of the providers that were right, reasons for the others.

    Attributes:
        memory: by provider, the bytes of its frozen weights, and of these and all that a call allocates.
    """

    x: int
    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    refused: Mapping[str, str]
    memory: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Runner:
    """Measures benchmarks on one machine.

    Attributes:
        quick: the small sizes, and just enough repetitions to have a number.
        seconds: to time the functions of a case for.
        timers: by the metric that they give; on a GPU also in a graph.
        notes: everything that was left out, with its reason, once.
    """

    def __init__(self, machine: Machine, quick: bool = False, seconds: float = 1.0):
        self.machine, self.quick = machine, quick
        self.seconds = 0.02 if quick else seconds
        self.timers = {"time_ns": times} | ({"graph_ns": graph_times} if machine.device.type == "cuda" else {})
        self.notes: list[str] = []

    def cases(self, bench: Bench) -> Iterator[Case]:
        if bench.gpu_only and self.machine.device.type == "cpu":
            self._note(f"{bench.kernel} is left out: it compares GPU kernels")
            return
        for config in bench.configs:
            dtype = config["dtype"]
            if bench.products and self.machine.emulates(dtype):
                self._note(f"{bench.kernel} in {dtype} is left out: this machine emulates {dtype} products")
                continue
            for x in bench.quick_sizes if self.quick else bench.sizes:
                gc.collect()  # peers' modules are in cycles, and the case before may have taken gigabytes
                yield self._case(bench, x, config)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _case(self, bench: Bench, x: int, config: Mapping[str, Any]) -> Case:
        inputs = bench.inputs(x, self.machine.device, **config)
        check = bench.check(inputs)
        right, refused = {}, {}
        for name, provider in bench.providers.items():
            try:
                function = provider(inputs)
                check(function())
            except ModuleNotFoundError as error:
                self._note(f"{name} is left out: the package {error.name} is not installed")
            except Unavailable as error:
                self._note(f"{name} is left out: {error}")
            except AssertionError as error:
                refused[name] = str(error)
            else:
                right[name] = function
        rows = []
        for metric, timer in self.timers.items() if right else ():
            for name, sample in zip(right, timer(list(right.values()), self.machine.device, self.seconds)):
                if sample:
                    rows.append(self._row(bench, name, metric, x, config, sample))
                else:
                    self._note(f"{name} of {bench.kernel} cannot be captured in a CUDA graph: it has no graph time")
        memory = {name: self._memory(bench.weights[name](inputs), right[name]) for name in right if bench.weights}
        return Case(x, config, tuple(rows), refused, memory)

    def _memory(self, weights: int, function: Callable[[], Any]) -> tuple[int, int]:
        if self.machine.device.type == "cpu":
            return weights, weights + highest_of_new_thread(function)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return weights, weights + torch.cuda.max_memory_allocated() - before

    def _row(
        self, bench: Bench, provider: str, metric: str, x: int, config: Mapping[str, Any], seconds: list[float]
    ) -> Row:
        n_bytes, flops = bench.cost(x, **config)
        floor = n_bytes / self.machine.bytes_per_s
        if bench.products:  # the other ops' arithmetic is not a matmul, and waits for memory
            floor = max(floor, flops / self.machine.flops_per_s[config["dtype"]])
        quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
        p20, p50, p80 = (round(1e9 * t, 1) for t in quantiles.tolist())
        return Row(
            kernel=bench.kernel,
            provider=provider,
            mode=bench.mode,
            metric=metric,
            x=x,
            p20=p20,
            p50=p50,
            p80=p80,
            bytes=n_bytes,
            flops=flops,
            roofline_share=round(1e9 * floor / p50, 4),
            config=json.dumps(config),
            device=self.machine.name,
            versions=json.dumps(self.machine.versions),
            commit=self.machine.commit,
        )
