"""What is asked of the machine's allocator, and what a run says of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.config import TrainerConfig
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


@pytest.mark.parametrize("others, words", [(0.1, None), (0.9, "others keep 0.9 of 2 cores busy")])
def test_says_that_others_need_the_cores(monkeypatch, others, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setattr("kernels.cpu.others.os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(machine.LOAD, "cores", lambda: others)
    line, about = machine.describe(torch.device("cpu"), torch.float32), machine.about(torch.device("cpu"))
    assert ("busy" in line) == about["crowded"] == (words is not None) and (words or "") in line
    assert about["threads"] == 2 and about["others_cores"] == others and about["device"] in line


@pytest.mark.parametrize(
    ("cores", "processes", "asked", "threads", "words"),
    [
        (64, 1, None, 16, ", 16 threads for 64 cores, trainer.threads=64 for all)"),
        (64, 1, 64, 64, ", 64 threads)"),
        (64, 8, None, 8, ", 8 threads)"),
        (64, 2, None, 16, ", 16 threads for 32 cores, trainer.threads=32 for all)"),
        (16, 1, None, 16, ", 16 threads)"),
        (1, 1, None, 1, ", 1 thread)"),
        (1, 2, None, 1, ", 1 thread)"),
    ],
)
def test_threads_on_machines_of_every_size(monkeypatch, cores, processes, asked, threads, words):
    set_to = [cores]  # torch has a thread for each core at first
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(machine.cpu.threads, "share_cores", lambda: None)
    monkeypatch.setattr(machine.LOAD, "cores", lambda: 0.0)
    for name in ("size", "local_size"):
        monkeypatch.setattr(machine.parallel, name, lambda: processes)
    machine.set_up_cpu(TrainerConfig(threads=asked))
    assert set_to[-1] == threads
    assert words in machine.describe(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("free", "kept"), [(2**31, False), (2**34, True), (None, True)])
def test_freed_memory_is_kept_unless_it_is_scarce(monkeypatch, free, kept):
    asked = []
    monkeypatch.setattr(machine.memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(machine, "_allocator", lambda **limits: asked.append(limits))
    monkeypatch.setattr(machine, "_huge_pages", lambda: None)
    machine.keep_freed_memory()
    assert bool(asked) == kept
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    machine.set_up_cpu(TrainerConfig())
    assert ("ONEDNN_PRIMITIVE_CACHE_CAPACITY" in os.environ) != kept
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
