"""Print whether a process that keeps freed memory has asked for huge pages for its heap."""

from pathlib import Path

from experiments.system import machine

machine.keep_freed_memory()
heap = Path("/proc/self/smaps").read_text().split("[heap]")[1:]
print(any(" hg" in part.partition("VmFlags:")[2].partition("\n")[0] for part in heap))
