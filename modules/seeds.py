"""The seeds of the adapters' dropout, the same ones in a forward pass that checkpointing computes again.

torch's checkpointing restores the state of the random generators, which a CUDA graph cannot. Here the seeds themselves
are kept. The generators go on as they would, so the masks are those of torch's way bit for bit.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.dropout import new_seed

_here = threading.local()  # backward, and with it the second forward pass, runs in a thread of its own


def draw(device: torch.device) -> Tensor:
    """The next seed, int64 []."""
    return _source()(device)


def kept() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts for the first forward pass and for the second: `context_fn` of torch.utils.checkpoint.checkpoint. One
    may be inside another."""
    seeds: list[Tensor] = []
    return _taking(seeds), _giving(seeds)


def _source() -> Callable[[torch.device], Tensor]:
    return getattr(_here, "source", new_seed)


def _taking(seeds: list[Tensor]) -> contextlib.AbstractContextManager:
    """Inside, seeds come from where they came outside, and are kept."""

    def taken(device: torch.device) -> Tensor:
        seeds.append(outside(device))
        return seeds[-1]

    outside = _source()
    return _drawing(taken)


def _giving(seeds: list[Tensor]) -> contextlib.AbstractContextManager:
    left = iter(seeds)
    return _drawing(lambda device: next(left))


@contextlib.contextmanager
def _drawing(source: Callable[[torch.device], Tensor]) -> Iterator[None]:
    before = vars(_here).copy()
    _here.source = source
    try:
        yield
    finally:
        vars(_here).clear()
        vars(_here).update(before)
