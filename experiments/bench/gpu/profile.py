"""Where the time of a training step on a GPU goes: by op, by kernel, and how long the GPU waits for the host."""

import argparse
import os
import statistics
from collections.abc import Mapping

import torch

from experiments.bench.gpu import driver, trace
from experiments.bench.gpu.ours import Ours
from experiments.bench.gpu.stages import Case
from experiments.bench.gpu.trace import Busy
from experiments.system import machine
from experiments.training.graphs import Eager

STEPS, SHOWN = 10, 12  # timed; lines of a table


def run(options: argparse.Namespace) -> None:
    # A graph that was captured before a profile must be seen in it, and must live on after it
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    length = options.length or driver.PROMPT
    case = Case(
        options.method,
        options.preset or "llama-3-8b",
        options.layers,
        batch=options.batch,
        length=length,
        rank=options.rank,
    )
    print(f"{case}, rank {case.rank}: {machine.describe(torch.device('cuda'), torch.bfloat16)}")
    print(*lines(case, "cuda"), sep="\n")


def lines(case: Case, device: str) -> list[str]:
    """Build the case on `device`, train it, and describe a step."""
    job = driver.job_of(case, device)
    batch = driver.tokens(job, case.batch, case.length)
    side = Ours()
    side.build(job)
    side.steps(batch, driver.CHECKED)
    wall = statistics.median(side.steps(batch, STEPS)[1])
    graphed = trace.busy(trace.events_of(lambda: side._step(batch)))
    floor = side.products(case.batch * case.length)
    if side.trainer.static is not None:
        side.trainer.static.graphs = Eager()  # for in a graph no kernel belongs to an op
    side.steps(batch, 1)
    eager_wall = statistics.median(side.steps(batch, STEPS)[1])
    events = trace.events_of(lambda: side._step(batch))
    return described(wall, graphed, eager_wall, trace.busy(events), trace.by_op(events), floor)


def described(
    wall: float, graphed: Busy, eager_wall: float, eager: Busy, ops: Mapping[str, tuple[float, int]], floor: float
) -> list[str]:
    """The tables of a step: as it trains, and without graphs, by op."""
    text = [f"{'':<56}{'ms':>10}{'busy':>10}{'idle':>8}{'kernels':>9}{'launches':>10}"]
    for name, seconds, busy in (("a step", wall, graphed), ("a step without CUDA graphs", eager_wall, eager)):
        idle = busy.idle_share(seconds)
        text.append(
            f"{name:<56}{1e3 * seconds:>10.2f}{1e3 * busy.seconds:>10.2f}{idle:>8.1%}{busy.kernels:>9,}"
            f"{busy.launches:>10,}"
        )
    text.append(
        f"{'its products with frozen weights, timed alone':<56}{1e3 * floor:>10.2f}{floor / wall:>17.1%} of a step"
    )
    text += ["", f"{'GPU time by op, without CUDA graphs':<56}{'ms':>10}{'share':>10}{'kernels':>17}"]
    total = sum(seconds for seconds, _ in ops.values())
    for name, (seconds, kernels) in _largest(ops):
        text.append(f"{name[:55]:<56}{1e3 * seconds:>10.2f}{seconds / total:>10.1%}{kernels:>17,}")
    text += ["", f"{'GPU time by kernel':<56}{'ms':>10}{'share':>10}"]
    for name, seconds in list(graphed.by_name.items())[:SHOWN]:
        text.append(f"{name[:55]:<56}{1e3 * seconds:>10.2f}{seconds / graphed.seconds:>10.1%}")
    return text


def _largest(ops: Mapping[str, tuple[float, int]]) -> list[tuple[str, tuple[float, int]]]:
    """The largest ops, and all others together."""
    items = list(ops.items())
    rest = items[SHOWN:]
    if not rest:
        return items
    together = sum(seconds for _, (seconds, _) in rest), sum(kernels for _, (_, kernels) in rest)
    return [*items[:SHOWN], (f"{len(rest)} others", together)]
