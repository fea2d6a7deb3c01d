"""python -m kernels.bench [op …] [--csv FILE] [--plot DIR] [--seconds S] [--models] [--quick]"""

import datetime
import sys
from pathlib import Path

from kernels import commands
from kernels.bench.arguments import parse
from kernels.bench.machine import this_machine
from kernels.bench.registry import benches
from kernels.bench.report import CsvFile, Table, plot
from kernels.bench.runner import Runner
from kernels.bench.spec import Bench
from kernels.cpu.others import SLACK, OthersLoad
from kernels.op import interpreting


def main(argv: list[str]) -> int:
    options = parse(argv)
    if interpreting():
        message = "TRITON_INTERPRET=1: the time of Triton's interpreter says nothing about speed; unset it"
        print(f"error: {message}", file=sys.stderr)
        return 1
    known = benches()
    chosen = [known[op] for op in options.ops or known]
    csv = options.csv or _default_csv()
    return run(chosen, csv, options.plot, options.quick, options.seconds, options.models)


def run(
    chosen: list[Bench], csv: Path, plots: Path | None, quick: bool, seconds: float = 1.0, models: bool = False
) -> int:
    file = CsvFile(csv)
    machine = this_machine()
    speeds = ", ".join(f"{name} {speed / 1e9:,.0f} GFLOP/s" for name, speed in machine.flops_per_s.items())
    print(f"{machine.name}: copies {machine.bytes_per_s / 1e9:,.0f} GB/s, multiplies {speeds}")
    print(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    runner, load = Runner(machine, quick, seconds), OthersLoad()
    written, wrong = [csv], False
    if models or machine.device.type != "cpu":
        chosen = [bench.of_models() for bench in chosen]
    for bench in chosen:
        table, rows = Table(bench, graphs="graph_ns" in runner.timers), []
        print(table.header())
        for case in runner.cases(bench):
            print(*table.lines(case), sep="\n", flush=True)
            file.add(case.rows)
            rows += case.rows
            wrong = wrong or bool(case.refused)
        if plots and rows:
            written.append(plot(bench, rows, plots))
    if (others := load.cores()) > SLACK:
        runner.notes.append(
            f"others kept {others:.1f} cores of this machine busy meanwhile: measure again without them"
        )
    for note in runner.notes:
        print(f"\n{note}")
    print("\nWritten:", *written, sep="\n  ")
    return 1 if wrong else 0


def _default_csv() -> Path:
    return Path("outputs") / f"bench_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.csv"


if __name__ == "__main__":
    commands.run(main)
