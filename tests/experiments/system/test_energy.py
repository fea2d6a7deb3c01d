"""Energy counters of the processor: packages and memory, over wraps; none where the machine does not tell."""

import pytest

from experiments.system.energy import EnergyMeter


def test_energy_adds_up_packages_and_memory_over_wraps(tmp_path):
    def zone(folder: str, name: str, microjoules: int) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "name").write_text(name + "\n")
        (tmp_path / folder / "max_energy_range_uj").write_text("9999999\n")
        (tmp_path / folder / "energy_uj").write_text(f"{microjoules}\n")

    def counters(package: int, core: int, memory: int) -> None:
        zone("intel-rapl:0", "package-0", package)
        zone("intel-rapl:0:0", "core", core)  # a part of the package
        zone("intel-rapl:0:1", "dram", memory)

    counters(9_000_000, 5, 1_000_000)
    meter = EnergyMeter(tmp_path)
    counters(1_000_000, 4_000_005, 1_500_000)  # the package went through 0
    assert meter.joules() == pytest.approx(2.5)
    counters(3_000_000, 6_000_005, 1_500_000)
    assert meter.joules() == pytest.approx(4.5)


def test_energy_is_none_where_the_machine_does_not_tell(tmp_path):
    assert EnergyMeter(tmp_path / "missing").joules() is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "name").write_text("package-0\n")  # a counter that cannot be read
    assert EnergyMeter(tmp_path).joules() is None
