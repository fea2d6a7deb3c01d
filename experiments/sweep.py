"""Sweeps: what `-m` does with each job.

A run is known by `results.config_hash`: its resolved configuration and the version of the results. In the sweep's
folder its directory ends with that hash; where a result is there already nothing is done, and where checkpoints are
there it goes on from the newest. So a sweep that is started again in the same folder does only what is missing.

Each job has a process of its own, forked from a server that has imported everything and computed nothing: its peak
memory is its own, and one that dies does not stop the others. While it works it holds a lock, which the kernel takes
back from a process that dies: several sweeps, also of different machines that share a file system with locks, may
write to one folder.
"""

import contextlib
import fcntl
import json
import multiprocessing
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments import checkpoints, parallel, results
from experiments.config import Config
from experiments.errors import UserError

DONE, DONE_BEFORE, ELSEWHERE, FAILED = "done", "done before", "being done by another process", "failed"
NAME_LENGTH = 120  # a file name may have 255 bytes


@dataclass
class Outcome:
    """How a job ended: DONE, DONE_BEFORE, ELSEWHERE or, with a line that says why, FAILED."""

    status: str
    reason: str = ""


def job(cfg: Config, name: str) -> Outcome:
    """Do the run `cfg` in a directory of its own inside `cfg.output_dir`, unless that has its result.

    Args:
        name: what the job varies; the directory's name starts with it.
    """
    if cfg.resume:
        return Outcome(FAILED, "a sweep resumes by itself: leave resume out and name its folder with output_dir=…")
    folder, identity = Path(cfg.output_dir), results.config_hash(cfg)
    new = folder / f"{name.replace('+', '').replace('/', '-')[:NAME_LENGTH]}_{identity}"
    directory = min(folder.glob(f"*_{identity}"), default=new)
    if _has_result(directory, identity):
        return Outcome(DONE_BEFORE)
    cfg.output_dir = str(directory)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.sweep"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(cfg, identity, sender))
    process.start()
    sender.close()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()  # for the run the same as Ctrl-C: it saves its weights first
        process.join()
        raise
    try:
        return receiver.recv()
    except EOFError:
        ended = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        return Outcome(FAILED, f"its process ended with {ended}; 9 is often a lack of memory")


def _run(cfg: Config, identity: str, sender: Connection) -> None:
    """What a job's process does: `run`, and send the outcome."""
    from experiments.run import run  # here, because it imports this module

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to every process; the sweep's passes it on
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=True)
    directory = Path(cfg.output_dir)
    try:
        with _claim(directory.parent / ".locks" / identity) as claimed:
            if not claimed:
                outcome = Outcome(ELSEWHERE)
            elif _has_result(directory, identity):
                outcome = Outcome(DONE_BEFORE)
            else:
                cfg.resume = checkpoints.LATEST if checkpoints.of_run(directory) else None
                print(f"\n{results.table(run(cfg))}\n")
                outcome = Outcome(DONE)
    except (UserError, OSError) as error:
        outcome = Outcome(FAILED, str(error))
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(FAILED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
    sender.send(outcome)


@contextlib.contextmanager
def _claim(lock: Path) -> Iterator[bool]:
    """Whether the block has `lock` to itself."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _has_result(directory: Path, identity: str) -> bool:
    try:
        return json.loads((directory / results.RESULT).read_text(encoding="utf-8"))["config_hash"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Summary(Callback):
    """Hydra's hook: lists how the jobs of a sweep ended, and ends it with exit code 1 if one failed."""

    def __init__(self):
        self.outcomes: list[tuple[str, Outcome]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        if parallel.size() > 1:
            message = "a sweep starts a process for each run itself: start it without torchrun"
            sys.exit(parallel.last_words(f"error: {message}"))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs) -> None:
        if isinstance(job_return.return_value, Outcome):  # a single run returns nothing
            self.outcomes.append((" ".join(job_return.overrides), job_return.return_value))

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        counts = Counter(outcome.status for _, outcome in self.outcomes)
        told = ", ".join(
            f"{counts[status]} {status}" for status in (DONE, DONE_BEFORE, ELSEWHERE, FAILED) if counts[status]
        )
        print(f"\n{len(self.outcomes)} runs in {config.output_dir}: {told}")
        failed = [(overrides, outcome) for overrides, outcome in self.outcomes if outcome.status == FAILED]
        for overrides, outcome in failed:
            print(f"failed: {overrides}: {outcome.reason}", file=sys.stderr)
        if len(failed) < len(self.outcomes):
            print(f"compare them: python -m experiments.report {config.output_dir}")
        if failed:
            sys.exit("error: start the sweep again with the same output_dir, and it does only what is missing")
