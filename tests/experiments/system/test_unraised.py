"""Errors that Python would only print."""

import subprocess
import sys

import pytest

from experiments.system.files import PROJECT_ROOT

CODE = """
import ctypes, signal, threading, time
from experiments.system.cli import command

class Thing:
    def __del__(self):
        raise MemoryError

def lacks():
    raise MemoryError

def wrong():
    raise ValueError("a mistake in the code")

@command
def main():
    Thing()
    for target in (lacks, wrong):
        thread = threading.Thread(target=target, name="helper")
        thread.start()
        thread.join()
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGTERM))()
    time.sleep(600)

main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a signal comes again by a timer of Unix")
def test_a_signal_in_a_callback_is_not_lost_and_a_lack_of_memory_is_a_line():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: out of memory in Thing.__del__, without which the work goes on",
        "note: out of memory in the thread helper, without which the work goes on",
    ]
    assert done.stderr.count("Traceback") == 1 and "a mistake in the code" in done.stderr
    assert done.returncode == 143 and done.stderr.endswith("\ninterrupted\n")
