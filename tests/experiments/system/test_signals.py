"""Processes that end with the one that started them."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection

import pytest

from experiments.system import signals

SECONDS = 60  # after which a process counts as one that stays


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_process_of_a_fork_server_ends_with_the_one_that_asked_for_it():
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    first = context.Process(target=_first, args=(theirs,))
    first.start()
    theirs.close()
    second = ours.recv()
    first.kill()
    ended = ours.poll(SECONDS)
    if not ended:
        os.kill(second, signal.SIGKILL)
    first.join()
    with pytest.raises(EOFError):
        ours.recv()
    assert ended, "it stays"


def _first(connection: Connection) -> None:
    context = multiprocessing.get_context("forkserver")
    context.Process(target=_second, args=(connection,)).start()
    connection.close()
    time.sleep(2 * SECONDS)


def _second(connection: Connection) -> None:
    signals.end_with_parent(signal.SIGTERM)
    connection.send(os.getpid())
    time.sleep(2 * SECONDS)
