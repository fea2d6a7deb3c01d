"""Several processes of one run, each forked from one that has torch and transformers imported already."""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra

from experiments import run
from experiments.system import parallel
from experiments.training.loop import Trainer


@dataclass(frozen=True)
class Ended:
    """How one process ended, and what it wrote to its terminal."""

    exitcode: int
    text: str


def processes(n: int, folder: Path, work: Callable, *args) -> list[Ended]:
    """Call `work`, a function of a module, in `n` processes with what torchrun puts into the environment.

    Args:
        folder: what they print goes there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.run"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = []
    for rank in range(n):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        started.append(context.Process(target=_process, args=(environment, folder / str(rank), work, args)))
        started[-1].start()
    for process in started:
        process.join(300)
    hung = [process for process in started if process.is_alive()]
    for process in hung:
        process.kill()
    ended = [Ended(process.exitcode, (folder / str(rank)).read_text()) for rank, process in enumerate(started)]
    assert not hung, ended
    return ended


def _process(environment: dict[str, int | str], output: Path, work: Callable, args: tuple) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    write_to(output)
    work(*args)


def write_to(output: Path) -> None:
    """Have what this process prints in a file."""
    terminal = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)


def runs(jobs: list[list[str]]) -> None:
    """experiments.run with each of the command lines, one after the other, until one fails."""
    parallel.start()
    for arguments in jobs:
        _command(arguments)
    parallel.stop()


def failures(jobs: list[list[str]]) -> None:
    """The same, but goes on after one that fails; prints exit codes."""
    parallel.start()
    for arguments in jobs:
        try:
            _command(arguments)
        except SystemExit as end:
            print(f"exit code 1, {end.code}" if isinstance(end.code, str) else f"exit code {end.code}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        parallel.wait()
        if parallel.is_main():
            dist.distributed_c10d._get_default_store().delete_key(parallel.LAST_WORDS)
        parallel.wait()


def run_until(event: str, folder: Path, arguments: list[str]) -> None:
    """experiments.run in which a signal reaches the last process, and no other, at the beginning of a step.

    Args:
        event: the signal and the step: "SIGKILL 2".
        folder: what the processes print goes there.
    """
    write_to(folder / os.environ["RANK"])
    name, number = event.split()
    step_of = Trainer.step

    def step(self: Trainer, group: list) -> dict:
        if self.trained.steps + 1 == int(number) and parallel.rank() == parallel.size() - 1:
            os.kill(os.getpid(), signal.Signals[name])
        return step_of(self, group)

    Trainer.step = step
    runs([arguments])


def _command(arguments: list[str]) -> None:
    GlobalHydra.instance().clear()
    sys.argv = ["experiments.run", *arguments]
    run.main()
