"""python -m kernels.bench [op …] [--csv FILE] [--plot DIR] [--quick]"""

import argparse
import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernels.bench.machine import this_machine
from kernels.bench.registry import BENCHES
from kernels.bench.report import CsvFile, Table, plot
from kernels.bench.runner import Runner
from kernels.bench.spec import Bench
from kernels.cpu.others import SLACK, OthersLoad
from kernels.op import interpreting


def main(argv: Sequence[str] | None = None, benches: Mapping[str, Bench] = BENCHES) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Time our ops beside their peers.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which ops, by default all: {', '.join(benches)}")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default: outputs/bench_<time>.csv")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw a PNG for each op")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its times mean nothing")
    args = parser.parse_args(argv)
    if unknown := [op for op in args.ops if op not in benches]:
        return _error(f"no benchmark {unknown[0]!r}: choose from {', '.join(benches)}")
    if interpreting():
        return _error("TRITON_INTERPRET=1: the time of Triton's interpreter says nothing about speed; unset it")
    try:
        return _run([benches[op] for op in args.ops or benches], args.csv or _default_csv(), args.plot, args.quick)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(benches: list[Bench], csv: Path, plots: Path | None, quick: bool) -> int:
    file = CsvFile(csv)
    machine = this_machine()
    speeds = ", ".join(f"{name} {speed / 1e9:,.0f} GFLOP/s" for name, speed in machine.flops_per_s.items())
    print(f"{machine.name}: copies {machine.bytes_per_s / 1e9:,.0f} GB/s, multiplies {speeds}")
    print(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    runner, load = Runner(machine, quick), OthersLoad()
    written, wrong = [csv], False
    for bench in [bench.on(machine.device) for bench in benches]:
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


def _error(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
