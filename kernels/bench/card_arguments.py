"""The command line of kernels.bench.card."""

import argparse
import sys
from collections.abc import Sequence

STAGES = ("check", "products", "blocks", "linears", "experts", "packed")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The stages to run; `--help` and a mistake end the process."""
    description = "Check every op on this machine's GPU, time them, and print one short table."
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.card", description=description)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"which, by default all: {', '.join(STAGES)}")
    options = parser.parse_args(argv)
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        sys.exit(f"error: no stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    return options
