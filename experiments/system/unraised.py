"""Errors in a destructor, in a callback of C and in a thread. Python prints a traceback of each, and goes on.

One of them is a signal's: it must not be lost, so it comes again. Another is a lack of memory, which is a line.
"""

import functools
import signal
import sys
import threading

from experiments.system.signals import Interrupted

SOON = 0.05  # seconds until a signal comes again, which must not be before Python has left the hook


@functools.cache  # once a process
def watch() -> None:
    """From now on, until the process ends: a destructor may be the last thing in it."""
    unraisable, of_thread = sys.unraisablehook, threading.excepthook

    def in_callback(error) -> None:
        if isinstance(error.exc_value, Interrupted):
            _again(error.exc_value.exit_code - 128)
        elif issubclass(error.exc_type, MemoryError):
            _note(getattr(error.object, "__qualname__", type(error.object).__name__))
        else:
            unraisable(error)

    def in_thread(error) -> None:
        if issubclass(error.exc_type, MemoryError):
            _note(f"the thread {error.thread.name if error.thread else ''}")
        else:
            of_thread(error)

    sys.unraisablehook, threading.excepthook = in_callback, in_thread


def _again(number: int) -> None:
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, SOON)


def _note(where: str) -> None:
    print(f"note: out of memory in {where}, without which the work goes on", file=sys.stderr)
