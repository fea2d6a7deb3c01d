"""Energy, where the machine tells: Linux's RAPL counters of CPU packages and memory, for all that runs there."""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Adds up the counters' readings since it was made. Counters start again at 0 after some 10⁵ J, so read it every
    few minutes. By default only root can read them."""

    def __init__(self, powercap: Path = POWERCAP):
        self.total = 0.0
        self.counters: dict[Path, tuple[int, int]] = {}  # counter → its last value, its range: microjoules
        for zone in powercap.glob("intel-rapl:*"):  # AMD's too have this name
            try:
                if (zone / "name").read_text().startswith(("package-", "dram")):
                    counter = zone / "energy_uj"
                    self.counters[counter] = int(counter.read_text()), int((zone / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue

    def joules(self) -> float | None:
        """Since the meter was made; None if the machine does not tell."""
        if not self.counters:
            return None
        for counter, (last, size) in self.counters.items():
            now = int(counter.read_text())
            self.total += (now - last) % (size + 1) / 1e6
            self.counters[counter] = now, size
        return self.total
