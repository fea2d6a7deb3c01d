"""How much of the CPUs others use, and how threads wait then."""

import os
import resource
import subprocess
import sys

import pytest
import torch

from kernels.cpu import others, threads


@pytest.fixture
def stat(tmp_path, monkeypatch):
    """A /proc/stat to write: of each usable CPU the hundredths of a second that it was busy and idle."""
    monkeypatch.setattr(others, "STAT", tmp_path / "stat")
    monkeypatch.setattr(others.os, "sched_getaffinity", lambda pid: {0, 2})
    monkeypatch.setattr(others.os, "sysconf", lambda name: 100)
    clock = {"monotonic": 0.0, "process_time": 0.0}
    for name in clock:
        monkeypatch.setattr(others.time, name, lambda name=name: clock[name])

    def write(now: float, own: float, **cpus: tuple[int, int]) -> None:
        clock.update(monotonic=now, process_time=own)
        lines = [f"{name} {busy - 30} 10 10 {idle} 5 4 3 3 99 99" for name, (busy, idle) in cpus.items()]
        (tmp_path / "stat").write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *lines, "intr 5 1 2"]))

    return write


def test_counts_what_others_do_on_the_usable_cpus(stat):
    stat(10.0, 1.0, cpu0=(100, 100), cpu1=(100, 100), cpu2=(100, 100))
    load = others.OthersLoad()
    stat(12.0, 2.5, cpu0=(300, 100), cpu1=(300, 100), cpu2=(150, 250))  # 2 s and 0.5 s; 1.5 s of them its own
    assert load.cores() == pytest.approx(0.5)
    stat(14.0, 6.5, cpu0=(500, 100), cpu1=(300, 300), cpu2=(350, 250))
    assert load.cores() == 0.0


def test_says_nothing_where_the_system_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr(others, "STAT", tmp_path / "none")
    assert others.OthersLoad().cores() == 0.0


def test_crowded(monkeypatch):
    monkeypatch.setattr(others.os, "sched_getaffinity", lambda pid: set(range(4)))
    assert others.crowded(1.0, threads=4) and not others.crowded(1.0, threads=3)
    assert not others.crowded(0.1, threads=4) and not others.crowded(0.0, threads=64)


@pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")
def test_idle_threads_come_and_go():
    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    idle = threads._IdleThreads()
    x = torch.randn(64, 64)
    exact = x @ x
    before = tasks()
    for _ in range(3):
        idle.hold(True)
        thread = idle.thread
        idle.hold(True)
        assert idle.held and idle.thread is thread and thread.is_alive()
        assert tasks() >= before + 1 + threads._library().omp_get_num_procs()
        assert torch.equal(x @ x, exact)
        idle.hold(False)
        thread.join(10)
        assert not idle.held and not thread.is_alive()


@pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")
def test_a_process_that_looks_after_others_ends():
    code = "from kernels.cpu import threads; threads.share_cores(); threads._idle.hold(True); print('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


NO_ROOM = """
import resource
from pathlib import Path
from kernels.cpu import threads

def room(n_bytes):
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + n_bytes, resource.RLIM_INFINITY))

def sleep(seconds):
    held.append(threads._idle.held)
    if not rooms:
        raise SystemExit(f"{held}")
    room(rooms.pop())

held, rooms = [], [2**30, 12 * 2**20, 2**19]
threads.time.sleep, threads.crowded = sleep, lambda *load: True
threads._look_after_others()
"""


@pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")
def test_threads_without_room_for_their_stacks_end_nothing():
    """None for the first thread, which Python tells, and none for its team, of which libgomp dies; then there is."""

    def stacks() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (2**23, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    command = [sys.executable, "-c", NO_ROOM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=stacks)
    assert (done.stdout, done.stderr) == ("", "[False, False, False, True]\n")
