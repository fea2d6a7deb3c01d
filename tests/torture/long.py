"""Many steps: memory, files that are open, threads and the time of a step stay as they were."""

import gc
import os
import threading
import time
from pathlib import Path

import torch

from experiments import run  # noqa: F401  the import is no growth
from experiments.config import resolve
from experiments.runs import one_run
from experiments.system.cli import composed
from tests.experiments.helpers import SMALL, TINY, write_chats
from tests.torture.damaged import quiet

WARM = 0.4  # of the steps: caches and pools fill up
SLOWER = 1.5  # times the processor's time of a step may be in the last quarter that of the quarter after WARM
TIMED = 1000  # steps from which on times are compared
GROWTH = 16 * 2**20  # bytes of memory that may come on top: the records of metrics and what malloc keeps


def campaign(count: int, folder: Path, seed: int = 0) -> list[str]:
    """Train `count` tiny steps, with evaluations and checkpoints; a line for everything that grew after the first."""
    seen: dict[int, tuple[int, int, int, int]] = {}
    times: list[float] = []  # of the process, after each step

    def watch(record: dict) -> None:
        if "loss" in record:
            times.append(time.process_time())
        if "loss" in record and record["step"] in (int(WARM * count), count - 1):
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
            seen[record["step"]] = resident, len(os.listdir("/proc/self/fd")), threading.active_count(), tensors

    out = folder / "out"
    every = max(1, count // 40)
    where = ["data=jsonl", f"data.path={write_chats(folder)}", f"output_dir={out}", f"trainer.steps={count}"]
    where += [f"trainer.eval_every={every}", f"trainer.checkpoint_every={every}", f"seed={seed}"]
    with quiet():
        one_run.run(resolve(composed("+method=qdora", *TINY, *SMALL, "trainer.keep_best=true", *where)), watch=watch)
    early, late = (seen[step] for step in sorted(seen))
    findings = []
    if late[0] - early[0] > GROWTH:
        findings.append(f"long: memory grew from {early[0] >> 20} to {late[0] >> 20} MiB")
    for what, before, after in zip(("open files", "threads", "tensors"), early[1:], late[1:]):
        if after > before:
            findings.append(f"long: {what} grew from {before} to {after}")
    first, quarter = int(WARM * count), count // 4
    before, after = times[first + quarter] - times[first], times[-1] - times[-1 - quarter]
    if count >= TIMED and after > SLOWER * before:
        findings.append(f"long: a step took {before / quarter:.4f} s of the processor, later {after / quarter:.4f} s")
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    if len(kept) > 4:  # two, and the best weights that each of them goes back to
        findings.append(f"long: checkpoints stay: {kept}")
    return findings
