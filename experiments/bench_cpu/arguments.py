"""The command lines of experiments.bench_cpu, its curves and its profile. `--help` and a mistake end the process."""

import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import experiments.bench_cpu
from experiments.bench_cpu.cases import CASES

RUNS = {"ours-0": ("ours", 0), "peft-0": ("peft", 0), "peft-1": ("peft", 1)}  # of curves: side and seed
SMOOTHED = 20  # steps in a mean of curves: a single step's loss is its text's more than the model's
THREADS = "default: as many as torch takes"


def bench_cpu(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `cases` are those of CASES that `case` names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench_cpu", description=experiments.bench_cpu.__doc__.splitlines()[0]
    )
    parser.add_argument("case", nargs="*", help="a method, or a pattern such as 'SmolLM2*r=16 4×128' (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="training steps timed a side (default: %(default)s)")
    parser.add_argument("--threads", type=int, help=THREADS)
    parser.add_argument("--no-packing", dest="packing", action="store_false", help="leave out quantize and dequantize")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default: outputs/bench_cpu_<time>.csv")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the ratios")
    options = parser.parse_args(argv)
    patterns = options.case or ["*"]
    options.cases = [case for case in CASES if any(p == case.method or fnmatch.fnmatch(str(case), p) for p in patterns)]
    if not options.cases:
        parser.error(f"nothing matches {' '.join(options.case)}: there are {', '.join(map(str, CASES))}")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    return options


def curves(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench_cpu.curves", description="Loss curves of this project and of PEFT."
    )
    parser.add_argument("run", nargs="*", default=[*RUNS], help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help=THREADS)
    parser.add_argument("--csv", type=Path, metavar="FILE", default=Path("outputs/bench_cpu_curves.csv"))
    options = parser.parse_args(argv)
    if unknown := set(options.run) - set(RUNS):
        parser.error(f"{min(unknown)}: choose of {', '.join(RUNS)}")
    if options.steps < SMOOTHED:
        parser.error(f"--steps {options.steps}: at least {SMOOTHED}")
    return options


def profile(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_cpu.profile", description="A step's time.")
    parser.add_argument("method", nargs="?", default="qdora", choices=sorted({case.method for case in CASES}))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    return parser.parse_args(argv)
