"""Memory that is left, by all who limit it."""

import subprocess
import sys

import pytest
import torch

from experiments.system import memory
from experiments.system.files import PROJECT_ROOT

CODE = """
import resource, torch
from experiments.system.memory import free_bytes, _lines
used = _lines("/proc/self/status")["VmData"]
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**28, used + 2**28))
before = free_bytes(torch.device("cpu"))
kept = torch.zeros(2**25)
print(before, before - free_bytes(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits are read in /proc")
def test_a_limit_of_the_process():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    before, taken = map(int, done.stdout.split())
    assert 2**27 < before <= 2**28 and abs(taken - 2**27) < 2**25


@pytest.mark.parametrize("version", memory.CGROUPS)
def test_a_limit_of_the_group_and_of_those_around_it(tmp_path, version):
    most, used, reclaimed = memory.CGROUPS[version]
    for path, limit in (("", "max\n" if version == 2 else "9223372036854771712\n"), ("a", "5000\n"), ("a/b", "9000\n")):
        group = tmp_path / path
        group.mkdir(exist_ok=True)
        (group / most).write_text(limit)
        (group / used).write_text("4000\n")
        (group / "memory.stat").write_text(f"cache 7\n{reclaimed} 500\n")
    left = list(memory._left_in_groups(tmp_path, "/a/b", *memory.CGROUPS[version]))
    assert left[:2] == [5500, 1500] and all(one > 10**15 for one in left[2:])


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda name: (_ for _ in ()).throw(FileNotFoundError(name)))
    assert memory.free_bytes(torch.device("cpu")) is None
