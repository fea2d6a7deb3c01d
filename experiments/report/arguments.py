"""The command line of experiments.report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def report(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `--help` and a mistake end the process."""
    about = "Compare the results in a folder: DIR/report/report.html, report.md and runs.csv."
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=about)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=Path("outputs"))
    parser.add_argument("--to", metavar="COPY", type=Path, help="folder for the results without weights")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        sys.exit(f"error: {options.folder}: no such folder")
    return options
