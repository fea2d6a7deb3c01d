"""The seeds of the adapters' dropout, the same ones in a forward pass that checkpointing computes again.

torch's checkpointing restores the state of the random generators, which a CUDA graph cannot. Here the seeds themselves
are kept. The generators go on as they would, so the masks are those of torch's way bit for bit.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dropout import new_seed

_here = threading.local()  # backward, and with it the second forward pass, runs in a thread of its own


def draw(device: torch.device) -> Tensor:
    """The next seed, int64 []."""
    given, taken = getattr(_here, "given", None), getattr(_here, "taken", None)
    if given is not None:
        return next(given)
    seed = new_seed(device)
    if taken is not None:
        taken.append(seed)
    return seed


def kept() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts for the first forward pass and for the second: `context_fn` of torch.utils.checkpoint.checkpoint."""
    seeds: list[Tensor] = []
    return _drawing(taken=seeds), _drawing(given=seeds)


@contextlib.contextmanager
def _drawing(taken: list[Tensor] | None = None, given: list[Tensor] | None = None) -> Iterator[None]:
    before = vars(_here).copy()
    _here.taken, _here.given = taken, None if given is None else iter(given)
    try:
        yield
    finally:
        vars(_here).clear()
        vars(_here).update(before)
