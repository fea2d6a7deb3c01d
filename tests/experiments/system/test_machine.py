"""What is asked of the machine's allocator, and what a run says of the machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.system import machine
from experiments.system.files import PROJECT_ROOT


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no transparent huge pages"
)
def test_the_heap_asks_for_huge_pages():
    done = subprocess.run(
        [sys.executable, "-m", "tests.experiments.system.huge_pages"], cwd=PROJECT_ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_says_which_kernels_a_cpu_lacks(monkeypatch):
    assert "libgomp" not in machine.describe(torch.device("cpu"), torch.float32)
    monkeypatch.setattr("kernels.cpu.threads.available", lambda: False)
    assert "without kernels for CPUs: this PyTorch brings no libgomp" in machine.describe(
        torch.device("cpu"), torch.bfloat16
    )
