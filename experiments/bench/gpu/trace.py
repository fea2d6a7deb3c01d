"""The GPU's side of a step, from torch.profiler's events: busy time, kernels, launches, time by kernel.

This file imports nothing of the project: it runs in the processes of others too.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")  # and their variants


@dataclass(frozen=True)
class Busy:
    """Of one step.

    Attributes:
        seconds: the sum of the times of all kernels, copies among them.
        kernels: that the GPU ran.
        launches: calls of the host that start something; a graph is one.
        by_name: seconds of each kernel, the largest first.
    """

    seconds: float
    kernels: int
    launches: int
    by_name: dict[str, float]

    def idle_share(self, wall: float) -> float:
        """Of `wall` seconds. Kernels that overlap may be busy for longer."""
        return max(0.0, 1 - self.seconds / wall)


def busy(events: Iterable) -> Busy:
    """Of the events of a profile (`profile.events()`)."""
    spent: Counter[str] = Counter()
    kernels = launches = 0
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if not getattr(event, "is_user_annotation", False):  # record_function's spans: they hold kernels
                spent[event.name] += event.time_range.elapsed_us() / 1e6
                kernels += 1
        else:
            launches += event.name.startswith(LAUNCHES)
    return Busy(sum(spent.values()), kernels, launches, dict(spent.most_common()))


def by_op(events: Iterable) -> dict[str, tuple[float, int]]:
    """(GPU seconds, kernels) of each op that the host called, the largest first; of a step without graphs, whose
    kernels belong to no call. An op of this project has the kernels of all that it calls."""
    seconds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA or not event.self_device_time_total:
            continue
        name, parent = event.name, event
        while parent is not None:
            if parent.name.startswith(("qdora::", "Optimizer")):
                name = parent.name
            parent = parent.cpu_parent
        seconds[name] += event.self_device_time_total / 1e6
        kernels[name] += max(1, len(event.kernels))
    return {name: (time, kernels[name]) for name, time in seconds.most_common()}


def events_of(step: Callable[[], object]) -> list:
    """The events of a step on the GPU, from its first kernel to its last."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as trace:
        step()
        torch.cuda.synchronize()
    return trace.events()


def of_step(step: Callable[[], object]) -> dict:
    """The fields of the `Busy` of a step."""
    return asdict(busy(events_of(step)))
