"""The command lines of experiments.bench, its curves and its profile. `--help` and a mistake end the process."""

import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import experiments.bench
from experiments.bench.cases import CASES
from experiments.bench.gpu.stages import STAGES

RUNS = {"ours-0": ("ours", 0), "peft-0": ("peft", 0), "peft-1": ("peft", 1)}  # of curves: side and seed
SMOOTHED = 20  # steps in a mean of curves: a single step's loss is its text's more than the model's
DEVICE = "default: a GPU if there is one"
THREADS = "default: as many as torch takes"


def bench(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `cases` are those of CASES that `case` names, `stages` those of STAGES."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench", description=experiments.bench.__doc__.splitlines()[0]
    )
    names = ", ".join(stage.name for stage in STAGES)
    told = f"on a CPU a method, or a pattern such as 'SmolLM2*r=16 4×128'; on a GPU of {names} (default: all)"
    parser.add_argument("case", nargs="*", help=told)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if one is there"
    )
    parser.add_argument("--steps", type=int, help="training steps timed a side (default: 5 on a CPU, 20 on a GPU)")
    parser.add_argument("--threads", type=int, help=f"on a CPU; {THREADS}")
    parser.add_argument("--no-packing", dest="packing", action="store_false", help="on a CPU: no quantize, dequantize")
    parser.add_argument("--unsloth", type=Path, metavar="DIR", help="where unsloth is, if it is not installed here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default: outputs/bench_<time>.csv")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (on a GPU: always, beside the CSV)")
    options = parser.parse_args(argv)
    patterns = options.case or ["*"]
    options.cases = [case for case in CASES if any(p == case.method or fnmatch.fnmatch(str(case), p) for p in patterns)]
    options.stages = [stage for stage in STAGES if any(fnmatch.fnmatch(stage.name, p) for p in patterns)]
    if not options.cases and not options.stages:
        there = ", ".join(map(str, CASES))
        parser.error(f"nothing matches {' '.join(options.case)}: there are {there}; on a GPU {names}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    if options.unsloth and not (options.unsloth / "unsloth").is_dir():
        parser.error(f"--unsloth {options.unsloth}: no folder unsloth in it")
    return options


def curves(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.curves", description="Loss curves of this project and of PEFT."
    )
    parser.add_argument("run", nargs="*", default=[*RUNS], help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help=THREADS)
    parser.add_argument("--csv", type=Path, metavar="FILE", default=Path("outputs/bench_curves.csv"))
    options = parser.parse_args(argv)
    if unknown := set(options.run) - set(RUNS):
        parser.error(f"{min(unknown)}: choose of {', '.join(RUNS)}")
    if options.steps < SMOOTHED:
        parser.error(f"--steps {options.steps}: at least {SMOOTHED}")
    return options


def profile(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.profile", description="A step's time.")
    parser.add_argument("method", nargs="?", default="qdora", choices=sorted({case.method for case in CASES}))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, help="tokens of a text (default: 128 on a CPU, 512 on a GPU)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE)
    parser.add_argument("--preset", help="on a GPU: a model of conf/model, with random weights (default: llama-3-8b)")
    parser.add_argument("--layers", type=int, help="on a GPU: so many of its layers (default: all)")
    options = parser.parse_args(argv)
    for name in ("rank", "batch", "length", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1 + (name == "length"):
            parser.error(f"--{name} {value}: at least {1 + (name == 'length')}")
    return options


def packing(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.packing", description="Tokens a second with and without packing."
    )
    parser.add_argument("--rounds", type=int, default=6, help="packs timed, and as many tokens in batches (default: 6)")
    parser.add_argument("--threads", type=int, help=THREADS)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    return options
