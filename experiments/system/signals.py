"""The signals that end a command: Ctrl-C, a scheduler's SIGTERM, and SIGHUP when its terminal closes."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType

_PDEATHSIG = 1  # Linux's PR_SET_PDEATHSIG
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """One of ENDING came.

    Attributes:
        everywhere: every process of the run raises it, at the same point.
    """

    def __init__(self, number: int, everywhere: bool = False):
        super().__init__()
        self.exit_code, self.everywhere = 128 + number, everywhere


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `handler` gets the signals of ENDING; one that is ignored stays so, as under nohup."""
    if threading.current_thread() is not threading.main_thread():  # no other can handle signals
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        for number, old in before.items():
            if old not in (signal.SIG_IGN, None):
                signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            if old is not None:
                signal.signal(number, old)


def end_with_parent(number: int) -> None:
    """Have Linux send this process the signal when the process that started it has ended, however that was.

    A fork server counts as having ended with the last process that holds its pipe. This process, which it may have
    forked for another, lets go of that; otherwise it would keep the server, and so itself, alive. A process that has
    started a server of its own keeps it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, number)
        server = forkserver._forkserver
        if server._forkserver_pid is None and server._forkserver_alive_fd is not None:
            os.close(server._forkserver_alive_fd)
            server._forkserver_alive_fd = None


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler that raises Interrupted."""
    leave_terminal(number)
    raise Interrupted(number)


def leave_terminal(number: int) -> None:
    """After SIGHUP stop printing to the terminal: it is gone, and an error there would end the work that is left."""
    if number == signal.SIGHUP:
        for name in ("stdout", "stderr"):
            if getattr(sys, name).isatty():
                setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
