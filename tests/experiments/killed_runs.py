"""Runs that end in SIGKILL, in processes forked from one that has torch and transformers imported already."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from experiments import run
from experiments.runs.output_files import OutputFiles


def kill(overrides: list[str], at: str) -> None:
    """Run experiments.run with these overrides until it kills itself.

    Args:
        at: "log N": half the record of step N written; "save N": the checkpoint of step N written but not renamed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.run"])
    process = context.Process(target=_run, args=(overrides, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, process.exitcode


def _run(overrides: list[str], at: str) -> None:
    what, step = at.split()

    def log(self: OutputFiles, record: dict) -> None:
        self.records.append(record)
        line = json.dumps(record) + "\n"
        dies = what == "log" and record["step"] == int(step)
        with self.metrics.open("a") as file:
            file.write(line[: len(line) // 2] if dies else line)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    rename = os.rename

    def rename_or_die(source: Path, target: Path) -> None:
        if what == "save" and Path(target).name == f"step-{int(step):08}":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    OutputFiles.log, os.rename = log, rename_or_die
    sys.argv = ["experiments.run", *overrides]
    run.main()
