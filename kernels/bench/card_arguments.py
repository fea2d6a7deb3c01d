"""The command line of kernels.bench.card."""

import argparse
from collections.abc import Sequence


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """No options but `--help`; a mistake ends the process."""
    description = "Check every op on this machine's GPU, time them, and print one short table."
    return argparse.ArgumentParser(prog="python -m kernels.bench.card", description=description).parse_args(argv)
