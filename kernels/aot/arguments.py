"""The command line of kernels.aot."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kernels import aot
from kernels.aot.targets import TARGETS


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `--help` and a mistake end the process."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=aot.__doc__.splitlines()[0])
    parser.add_argument("pattern", nargs="*", help="kernel, or kernel/config with wildcards (default: all)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write the table to FILE")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw instructions a weight, with --peers")
    parser.add_argument("--peers", action="store_true", help="add the installed bitsandbytes' kernels")
    parser.add_argument(
        "--targets", type=lambda names: names.split(","), default=[*TARGETS], help=f"default: {','.join(TARGETS)}"
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=2, help="compile N at a time (default: %(default)s)")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"unknown target {', '.join(unknown)}; choose from {', '.join(TARGETS)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    return options
