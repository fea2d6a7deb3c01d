"""Campaigns against the promise that nothing is lost and nothing silently wrong.

    python -m tests.torture                        every campaign, in a few minutes
    python -m tests.torture N=500                  500 kills, and of the others as many as take about as long
    python -m tests.torture damaged=5000 killed=0  one of them, of this size; also seed=1, for other random numbers

Each finding is a line. Exit code 1: there are some. The numbers in it say which case it was: the same seed repeats it.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; it has no say where there is a GPU

from tests.torture import at_once, damaged, full, hostile, killed, long, numbers

CAMPAIGNS = {  # and how many cases take about as long as one kill
    "damaged": (damaged, 10),
    "killed": (killed, 1),
    "full": (full, 1),
    "at_once": (at_once, 0.2),
    "hostile": (hostile, 4),
    "numbers": (numbers, 0.4),
    "long": (long, 4),
}


def main() -> int:
    given = {}
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name not in (*CAMPAIGNS, "N", "seed") or not value.isdigit():
            print(f"error: {argument}: give {', '.join(CAMPAIGNS)}, N or seed a number", file=sys.stderr)
            return 1
        given[name] = int(value)
    size, found = given.get("N", 0 if given.keys() & CAMPAIGNS.keys() else 50), []
    for name, (module, share) in CAMPAIGNS.items():
        if not (count := given.get(name, int(size * share))):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            findings = module.campaign(count, Path(folder), given.get("seed", 0))
        found += findings
        print(
            "\n".join([f"{name}: {count} cases, {len(findings)} findings, {time.monotonic() - began:.0f} s", *findings])
        )
        sys.stdout.flush()
    return 1 if found else 0


if __name__ == "__main__":
    try:
        code = main()
    finally:
        killed.stop_server()
    sys.exit(code)
