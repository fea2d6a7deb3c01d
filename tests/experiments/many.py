"""Runs of several processes, each forked from one that has torch and transformers imported already."""

import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments import run


@dataclass(frozen=True)
class Ended:
    """How one process ended, and what it wrote to its terminal."""

    exitcode: int
    text: str


def processes(n: int, folder: Path, *overrides: str, at: str = "") -> list[Ended]:
    """experiments.run in `n` processes with what torchrun puts into the environment.

    Args:
        folder: what they print goes there.
        at: "kill N", "interrupt N": what happens to the last process in step N.
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
        started.append(context.Process(target=_run, args=(environment, overrides, folder / str(rank), at)))
        started[-1].start()
    for process in started:
        process.join(120)
    hung = [process for process in started if process.is_alive()]
    for process in hung:
        process.kill()
    ended = [Ended(process.exitcode, (folder / str(rank)).read_text()) for rank, process in enumerate(started)]
    assert not hung, ended
    return ended


def _run(environment: dict[str, int | str], overrides: tuple[str, ...], output: Path, at: str) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    terminal = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    sys.argv = ["experiments.run", *overrides]
    run.cli()
