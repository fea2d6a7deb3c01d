"""Processes that end with the one that started them."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_process_keeps_the_server_that_it_has_started():
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_starts_one, args=(theirs,))
    process.start()
    theirs.close()
    assert ours.recv() == [0, 0]
    process.join()


def _starts_one(connection: Connection) -> None:
    forkserver._forkserver = forkserver.ForkServer()  # not the one that it comes from
    forkserver.connect_to_new_process = forkserver._forkserver.connect_to_new_process
    codes = []
    for _ in range(2):
        another = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
        another.start()
        another.join()
        codes.append(another.exitcode)
        signals.end_with_parent(signal.SIGKILL)
    connection.send(codes)


def _first(connection: Connection) -> None:
    context = multiprocessing.get_context("forkserver")
    context.Process(target=_second, args=(connection,)).start()
    connection.close()
    time.sleep(2 * SECONDS)


def _second(connection: Connection) -> None:
    signals.end_with_parent(signal.SIGTERM)
    connection.send(os.getpid())
    time.sleep(2 * SECONDS)
