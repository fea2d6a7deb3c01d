"""Sweeps: the jobs of `-m`.

A run is known by `config_hash`: its resolved configuration and the version of the results. In the sweep's
folder its directory ends with that hash; a job with a result there is not done again, and one with checkpoints goes
on from the newest. So a sweep that is started again in the same folder does only the missing jobs.

Each job has a process of its own, forked from a server that has imported everything and computed nothing: its peak
memory is its own, and one that dies does not stop the others. They can share the packed base
(experiments/runs/shared_base.py) and what is measured before training (experiments/runs/before.py). A process holds a
lock while it works, and the kernel releases it when the process dies: several sweeps, also of different machines that
share a file system with locks, may write to one folder.
"""

import atexit
import contextlib
import functools
import json
import multiprocessing
import secrets
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.config import Config
from experiments.errors import UserError
from experiments.runs import checkpoints, shared_base
from experiments.runs.before import Before
from experiments.runs.identity import config_hash
from experiments.runs.one_run import run
from experiments.runs.result_numbers import table
from experiments.runs.start import configured
from experiments.system import parallel, signals, unraised
from experiments.system.files import NAME_LENGTH, RESULT, claim, write_atomically
from experiments.system.memory import out_of_memory
from modules.files.checked import Damaged, verify_file

DONE, DONE_BEFORE, ELSEWHERE, FAILED = "done", "done before", "being done by another process", "failed"
STOPPED = "stopped"  # by whoever watched it


@dataclass
class Outcome:
    """How a job ended: DONE or DONE_BEFORE, with the directory of its result; ELSEWHERE; FAILED or STOPPED, with a line
    that says why. `before`: what it and earlier jobs have measured before training."""

    status: str
    reason: str = ""
    directory: str | None = None
    before: dict[str, Before] = field(default_factory=dict)


_shared_base = shared_base.SharedBase()  # of the jobs of this process
_before: dict[str, Before] = {}  # likewise


def job(cfg: Config, name: str, watch: Callable[[dict], bool] | None = None) -> Outcome:
    """Do the run `cfg` in a directory of its own inside `cfg.output_dir`, unless that has its result.

    Args:
        name: the varied keys; the directory's name starts with it.
        watch: gets the record of each evaluation in training; returns True to stop the run.
    """
    if cfg.resume:
        return Outcome(FAILED, "a sweep resumes by itself: leave resume out and name its folder with output_dir=…")
    if cfg.overwrite:
        return Outcome(FAILED, "a sweep keeps its results: leave overwrite out, and choose another output_dir")
    folder, identity = Path(cfg.output_dir), config_hash(cfg)
    new = folder / f"{name.replace('+', '').replace('/', '-')[:NAME_LENGTH]}_{identity}"
    directory = min(folder.glob(f"*_{identity}"), default=new)
    if _has_result(directory, identity):
        return Outcome(DONE_BEFORE, directory=str(directory))
    cfg.output_dir = str(directory)
    cfg.tracking.group = cfg.tracking.group or folder.name
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("forkserver", force=True)  # joblib's processes have one that no other knows
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.runs.sweep"])
    base = _shared_base.of(cfg, context)
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(cfg, identity, base, dict(_before), watch is not None, theirs))
    process.start()
    theirs.close()
    try:
        while not isinstance(message := ours.recv(), Outcome):
            ours.send(watch(message))
    except (EOFError, ConnectionError):
        process.join()
        ended = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        return Outcome(FAILED, f"its process ended with {ended}; 9 is often a lack of memory")
    except KeyboardInterrupt:
        process.terminate()  # for the run the same as Ctrl-C: it saves a checkpoint first
        process.join()
        raise
    process.join()
    _before.update(message.before)
    return message


def hydra_job(cfg: DictConfig) -> Outcome:
    """The job of a multirun that Hydra composed as `cfg`."""
    try:
        return job(configured(cfg), HydraConfig.get().job.override_dirname)
    except UserError as error:
        return Outcome(FAILED, str(error))
    except KeyboardInterrupt as stop:
        stop.args = (f"go on with the same command and output_dir={cfg.output_dir}",)
        raise


class _Stopped(Exception):
    """Whoever watches the run wants no more of it."""


def _work(
    cfg: Config, identity: str, base: Path | None, before: dict[str, Before], watched: bool, connection: Connection
) -> None:
    """In a job's process: run, and send the outcome, and before it evaluations if the job is watched."""

    def watch(record: dict) -> None:
        if watched and "heldout_loss" in record and record["step"]:
            connection.send(record)
            if connection.recv():
                raise _Stopped(f"after step {record['step']}, at a held-out loss of {record['heldout_loss']:.4f}")

    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to every process; the sweep's passes them on
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signals.interrupt)
    unraised.watch()
    signals.end_with_parent(signal.SIGTERM)  # which ends with the sweep's process, also if that is killed
    sys.stdout.reconfigure(line_buffering=True)
    directory = Path(cfg.output_dir)
    try:
        with claim(directory.parent / ".locks" / identity) as claimed:
            if not claimed:
                outcome = Outcome(ELSEWHERE)
            elif _has_result(directory, identity):
                outcome = Outcome(DONE_BEFORE, directory=cfg.output_dir)
            else:
                cfg.resume = checkpoints.LATEST if checkpoints.of_run(directory) else None
                cfg.overwrite = cfg.resume is None  # what is there is of this job, and has no result
                print(f"\n{table(run(cfg, base, watch, before))}\n")
                outcome = Outcome(DONE, directory=cfg.output_dir)
    except _Stopped as stopped:
        outcome = Outcome(STOPPED, str(stopped))
    except Exception as error:
        outcome = Outcome(FAILED, _told(error))
    except KeyboardInterrupt:
        sys.exit(130)
    outcome.before = before
    with contextlib.suppress(ConnectionError):  # the sweep was killed; what the run has written is there
        connection.send(outcome)


def _told(error: Exception) -> str:
    """A line for the user; before it the traceback of an error that nobody expects."""
    if isinstance(error, UserError | OSError):
        return str(error)
    if (told := out_of_memory(error)) is None:
        traceback.print_exc()
        told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return told


def _has_result(directory: Path, identity: str) -> bool:
    try:
        verify_file(directory / RESULT)
        return json.loads((directory / RESULT).read_text(encoding="utf-8"))["config_hash"] == identity
    except Damaged as error:
        print(f"note: {error}: the run is done again", file=sys.stderr)
        return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _ends_the_sweep(hook: Callable[..., None]) -> Callable[..., None]:
    """Decorator: an error in the hook ends the sweep. Hydra only warns of one, so that a failed job would be forgotten
    and the exit code be 0."""

    @functools.wraps(hook)
    def call(*args, **kwargs) -> None:
        try:
            hook(*args, **kwargs)
        except Exception as error:
            sys.exit(f"error: {_told(error)}")

    return call


class Summary(Callback):
    """Hydra's hook: lists how the jobs of a sweep ended, and ends it with exit code 1 if one failed.

    A launcher may do a job in another process, with a copy of this object: outcomes go through files in the folder.
    """

    @_ends_the_sweep
    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        if parallel.size() > 1:
            message = "a sweep starts a process for each run itself: start it without torchrun"
            sys.exit(parallel.last_words(f"error: {message}"))
        if config.hydra.launcher._target_.endswith("SlurmLauncher") and shutil.which("srun") is None:
            sys.exit("error: no srun here: launcher=slurm is for a machine that submits jobs to SLURM")
        shared_base.delete_left()  # also where all jobs are done, so that none makes a base
        self.outcomes = Path(config.output_dir) / f".outcomes-{secrets.token_hex(4)}"
        atexit.register(shutil.rmtree, self.outcomes, ignore_errors=True)

    @_ends_the_sweep
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs) -> None:
        is_done = job_return.status is JobStatus.COMPLETED  # otherwise Hydra raises the job's error after all jobs
        if is_done and isinstance(job_return.return_value, Outcome):  # a single run returns nothing
            self.outcomes.mkdir(parents=True, exist_ok=True)
            outcome = job_return.return_value
            told = {"status": outcome.status, "reason": outcome.reason, "overrides": " ".join(job_return.overrides)}
            write_atomically(self.outcomes / f"{config.hydra.job.num:06}.json", json.dumps(told))

    @_ends_the_sweep
    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        outcomes = [json.loads(path.read_text()) for path in sorted(self.outcomes.glob("*.json"))]
        shutil.rmtree(self.outcomes, ignore_errors=True)
        counts = Counter(outcome["status"] for outcome in outcomes)
        told = ", ".join(
            f"{counts[status]} {status}" for status in (DONE, DONE_BEFORE, ELSEWHERE, FAILED) if counts[status]
        )
        print(f"\n{len(outcomes)} runs in {config.output_dir}: {told}")
        failed = [outcome for outcome in outcomes if outcome["status"] == FAILED]
        for outcome in failed:
            print(f"failed: {outcome['overrides']}: {outcome['reason']}", file=sys.stderr)
        if len(failed) < len(outcomes):
            print(f"compare them: python -m experiments.report {config.output_dir}")
        if failed:
            sys.exit("error: start the sweep again with the same output_dir, and it does only the missing jobs")
