"""How much of the CPUs other processes use."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
SLACK = 0.15  # of a core: what an idle system's services take now and then
IDLE = (3, 4)  # columns of a CPU's line in STAT: idle, and idle while it waits for a disk


class OthersLoad:
    """What other processes do on the CPUs that this one may use, since the object was made or asked before."""

    def __init__(self):
        self._last = self._read()

    def cores(self) -> float:
        """How many cores other processes kept busy on average; 0 where the system does not tell."""
        last, self._last = self._last, self._read()
        if last is None or self._last is None or self._last[0] <= last[0]:
            return 0.0
        seconds, busy, own = (now - before for now, before in zip(self._last, last))
        return max(0.0, busy - own) / seconds

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: of the clock, that the CPUs were busy, and that they worked for this process."""
        try:
            lines = STAT.read_text(encoding="ascii").splitlines()
            usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        except (OSError, AttributeError):  # not Linux
            return None
        ticks = 0
        for name, *columns in map(str.split, lines):
            if name in usable:  # the first eight columns are all time; the others count some of it twice
                ticks += sum(int(column) for i, column in enumerate(columns[:8]) if i not in IDLE)
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def crowded(others: float, threads: int) -> bool:
    """True if `threads` threads and the cores that others keep busy are more than the cores there are."""
    return others + threads > len(os.sched_getaffinity(0)) + SLACK if others else False
