"""The command line of kernels.bench."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels.bench.registry import NAMES


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `--help` and a mistake end the process."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Time our ops beside their peers.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which ops, by default all: {', '.join(NAMES)}")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default: outputs/bench_<time>.csv")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw a PNG for each op")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row of the table (default: %(default)s)")
    parser.add_argument("--models", action="store_true", help="shapes of real models on a CPU too, as on a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its times mean nothing")
    options = parser.parse_args(argv)
    if unknown := [op for op in options.ops if op not in NAMES]:
        sys.exit(f"error: no benchmark {unknown[0]!r}: choose from {', '.join(NAMES)}")
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g}: choose more than 0")
    return options
