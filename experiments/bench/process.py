"""A worker in a process of its own, at the other end of a pipe."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.system.files import PROJECT_ROOT


class Silent(Exception):
    """No answer in time."""


class Process:
    """Runs a file by its path, with `argument` in JSON and the pipe's file descriptor.

    Args:
        sees_project: whether it can import the project. Else `import kernels` finds nothing of it.
        path: more folders to import from.
    """

    def __init__(self, name: str, script: Path, argument: Any, sees_project: bool, path: Sequence[Path] = ()):
        self.name = name
        here, there = socket.socketpair()
        old = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        entries = [str(PROJECT_ROOT)] * sees_project + [str(Path(entry).absolute()) for entry in path]
        entries += [str(Path(entry).absolute()) for entry in old if Path(entry).resolve() != PROJECT_ROOT]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if entries:
            environment["PYTHONPATH"] = os.pathsep.join(entries)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), json.dumps(argument), str(there.fileno())],
            pass_fds=[there.fileno()],
            env=environment,
            cwd=tempfile.gettempdir(),
            process_group=0,  # Ctrl-C is for this process alone, which closes the other
        )
        there.close()
        self.pipe = Connection(here.detach())

    def send(self, *request) -> None:
        with contextlib.suppress(BrokenPipeError):  # `receive` says that it died
            self.pipe.send(request)

    def receive(self, seconds: float | None = None):
        """The next answer.

        Raises:
            Silent: none came in `seconds`.
            UserError: the process died.
        """
        try:
            if not self.pipe.poll(seconds):
                raise Silent(f"no answer in {seconds:.0f} s")
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise UserError(f"the process of {self.name} died; is there enough memory?") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has died
            self.pipe.send(None)
        self.pipe.close()
        self.process.wait()
