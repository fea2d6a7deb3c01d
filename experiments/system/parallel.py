"""The processes of one run: how many there are, their messages, and the share of the work of each.

    torchrun --nproc-per-node 2 -m experiments.run +method=qdora

Each process does its share of every batch. Process 0 alone writes and prints. With one process these functions do
nothing. training/engines.py spreads the model and its optimizer.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from experiments.config import Config
from experiments.errors import UserError
from experiments.system import signals

T = TypeVar("T")

# The others wait while process 0 writes its files. A process that ended is noticed at once, not after this time.
TIMEOUT = timedelta(minutes=30)

SECONDS_TO_LEAVE = 5  # for torchrun to see which process ended first, and to end the others
LAST_WORDS = "last words"  # how many processes had some, in the store that torchrun keeps

_noted = 0  # the signal that this process has had, and keeps waiting
_agreed = False  # whether a process of several has had one, which all of them know


def start() -> None:
    """Connect to the other processes that torchrun started, if there are any. All but process 0 stop printing."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    if not is_main():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else 0


def local_size() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1


def is_main() -> bool:
    return rank() == 0


def mode(cfg: Config) -> str:
    """How processes share the run: "one" (a single process), "ddp" or "fsdp"."""
    if size() == 1:
        return "one"
    return "ddp" if cfg.trainer.parallel == "auto" else cfg.trainer.parallel


def check(cfg: Config) -> None:
    """Refuse a run that several processes cannot do.

    Raises:
        UserError: they cannot; the message says what to do instead.
    """
    if size() == 1:
        return
    if cfg.trainer.batch_size < size():
        raise UserError(
            f"trainer.batch_size={cfg.trainer.batch_size} is too small for {size()} processes: raise it, or start fewer"
        )
    if cfg.trainer.compile:
        raise UserError("trainer.compile=true is for one process: leave it out, or start without torchrun")
    if mode(cfg) == "fsdp":
        if cfg.method.adapter not in ("none", "lora", "dora"):
            raise UserError(f"trainer.parallel=fsdp cannot train method={cfg.method.name}: use trainer.parallel=ddp")
        if cfg.optim.name == "adamw8bit":
            raise UserError(
                "trainer.parallel=fsdp cuts parameters where optim=adamw8bit has blocks of its state: use optim=adamw, "
                "or trainer.parallel=ddp, which spreads 8-bit state too"
            )


def share(items: list[T]) -> list[T]:
    """The items of this process, of a list that every process has; perhaps none."""
    return items[rank() :: size()]


def total(*numbers: float) -> list[float]:
    """The sum over all processes of each number, the same everywhere; every process must call it."""
    global _agreed
    if size() == 1:
        return list(numbers)
    sums = torch.tensor([*numbers, float(_noted > 0)], dtype=torch.float64)
    dist.all_reduce(sums)
    *found, interrupts = sums.tolist()
    _agreed = _agreed or interrupts > 0
    return found


def agree(value: T) -> T:
    """Process 0's value, in every process."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: T) -> list[T]:
    """The value of every process in order, in process 0; elsewhere nothing."""
    if size() == 1:
        return [value]
    values = [None] * size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values or []


def wait() -> None:
    """Until every process is here."""
    if size() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU whatever they compute on, which dist.barrier is not


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Inside, Ctrl-C and its like wait for `stop_if_interrupted`: several processes get them at different points of
    their work, and a step that is cut off cannot go on later. In one process a second Ctrl-C does not wait."""
    global _noted, _agreed

    def note(number: int, frame: FrameType | None) -> None:
        global _noted
        if _noted and size() == 1:
            signals.interrupt(number, frame)
        signals.leave_terminal(number)
        if size() == 1:
            with contextlib.suppress(OSError):  # not print, which the signal may have come in the middle of
                os.write(2, b"\ninterrupted: finishing what is under way first; once more ends it at once\n")
        _noted = number

    try:
        with signals.handled(note):
            yield
    finally:
        _noted, _agreed = 0, False


def interrupted() -> bool:
    """Whether a signal has come that one of the processes has kept waiting, the same in all."""
    return bool(_noted if size() == 1 else _agreed)


def stop_if_interrupted() -> None:
    """Raise Interrupted, in every process, after a signal that one of them has kept waiting."""
    if interrupted():
        raise signals.Interrupted(_noted or signal.SIGINT, everywhere=True)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block before the others, which then find its files in the cache. An error of its own
    they have too."""
    if not is_main():
        wait()
    try:
        yield
    finally:
        if is_main():
            wait()


def stops_together(error: BaseException) -> bool:
    """Whether `error` is one that all processes raise at the same point, so that they can still act together."""
    return size() == 1 or isinstance(error, UserError | KeyboardInterrupt)


def seed_of(seed: int) -> int:
    """The seed of this process' random numbers in training, such as dropout's; process 0's is `seed`."""
    return seed + 1_000_003 * rank()


def lost_another(error: Exception) -> bool:
    """Whether a message to another process failed, as it does after that one has ended."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def outlived() -> int:
    """Say that another process has ended, and give torchrun the time to tell which; the exit code to end with."""
    words = last_words("error: another process of this run has ended, so this one ends too")
    if isinstance(words, str):
        print(words, file=sys.stderr, flush=True)
    time.sleep(SECONDS_TO_LEAVE)
    return 1


def last_words(message: str) -> str | int:
    """The argument of sys.exit. Exit with `message`. If another process has printed one already, exit with code 1
    only."""
    if size() == 1:
        return message
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun quotes this file at the end
        told = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": told}))
    try:
        first = dist.distributed_c10d._get_default_store().add(LAST_WORDS, 1) == 1
    except RuntimeError:  # the store went with the process that had it
        first = True
    return message if first else 1
