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


def of_step(step: Callable[[], object]) -> dict:
    """The fields of the `Busy` of one step on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as trace:
        step()
        torch.cuda.synchronize()
    return asdict(busy(trace.events()))
