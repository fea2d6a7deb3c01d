"""What is asked of the machine's allocator."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.files import PROJECT_ROOT

SCRIPT = """
from experiments import machine
machine.keep_freed_memory()
heap = open("/proc/self/smaps").read().split("[heap]")[1:]
print(any(" hg" in part.partition("VmFlags:")[2].partition("\\n")[0] for part in heap))
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no transparent huge pages"
)
def test_the_heap_asks_for_huge_pages():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
