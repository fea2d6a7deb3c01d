"""Work on many small parts, shared out among processes of this machine."""

import collections
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from experiments.errors import UserError
from experiments.system import signals

T, R = TypeVar("T"), TypeVar("R")
WAITING = 3  # parts a process that are read before their results are taken

_work: Callable = None  # of a process that was started here


def in_order(work: Callable[[T], R], parts: Iterable[T], processes: int) -> Iterator[R]:
    """The result of `work` for each part, in the order of the parts, of which few are in memory at a time.

    Processes are forked, so that they have `work` and all that it refers to without a copy, and start at once. They
    must not use torch, whose threads do not outlive a fork.

    Raises:
        UserError: a process was killed.
    """
    if processes == 1:
        yield from map(work, parts)
        return
    said = os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns of forks
    waiting = collections.deque()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(work,))
    try:
        for part in parts:
            waiting.append(pool.submit(_do, part))
            if len(waiting) > WAITING * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(f"one of {processes} processes was killed, as when memory runs out: free some") from error
    finally:
        pool.shutdown(cancel_futures=True)
        if said == "false":
            os.environ.pop("TOKENIZERS_PARALLELISM", None)


def _begin(work: Callable) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signals.end_with_parent(signal.SIGKILL)


def _do(part: object) -> object:
    return _work(part)
