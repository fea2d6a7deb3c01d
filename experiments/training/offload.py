"""The inputs of checkpointed blocks in host memory, so that a GPU holds those of two blocks, not of all.

A copy goes to pinned memory while the GPU computes the block, on a stream of its own. In backward the input of the
block before is on its way back while a block is computed. Values are unchanged, bit for bit.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from experiments.config import Config


class Copies:
    """Copies between a GPU and pinned host memory, beside its computation."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor) -> Tensor:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is not given away before the copy is done
        return host

    def to_device(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Start a copy, behind all earlier ones."""
        with torch.cuda.stream(self.stream):
            return host.to(self.device, non_blocking=True), self.stream.record_event()

    def arrived(self, copy: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """The copy, which computation waits for."""
        tensor, event = copy
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        tensor.record_stream(current)
        return tensor


@dataclass(eq=False)
class _Kept:
    """An input: where it is on the host, the copy on its way back, and the input that was kept before it."""

    host: Any
    before: Callable[[], "_Kept | None"]
    copy: Any = None


class Offload:
    """Keeps inputs of blocks elsewhere from forward to backward.

    Args:
        copies: a `Copies`, or what does the same.
    """

    def __init__(self, copies: Any):
        self.copies = copies
        self.last: Callable[[], _Kept | None] = lambda: None  # weak: autograd alone holds what is kept

    def around(self, checkpointed: Callable) -> Callable:
        """The function `checkpointed`, torch's checkpoint, whose inputs are kept elsewhere."""

        def call(*args, **kwargs):
            with saved_tensors_hooks(self._keep, self._restore):  # inside a block checkpointing has its own
                return checkpointed(*args, **kwargs)

        return call

    def _keep(self, tensor: Tensor) -> "_Kept | Tensor":
        if not tensor.is_floating_point() or isinstance(tensor, torch.nn.Parameter) or tensor.numel() == 0:
            return tensor
        kept = _Kept(self.copies.to_host(tensor), self.last)
        self.last = weakref.ref(kept)
        return kept

    def _restore(self, kept: "_Kept | Tensor") -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._start(kept)
        if (before := kept.before()) is not None:
            self._start(before)
        tensor = self.copies.arrived(kept.copy)
        kept.copy = None
        return tensor

    def _start(self, kept: _Kept) -> None:
        if kept.copy is None:
            kept.copy = self.copies.to_device(kept.host)


def offload_of(cfg: Config, device: torch.device) -> Offload | None:
    """As `cfg` says; None on a CPU, and that is said."""
    if cfg.trainer.offload_activations and device.type != "cuda":
        print("trainer.offload_activations=true is for a GPU: on a CPU activations are in host memory already")
    return Offload(Copies(device)) if cfg.trainer.offload_activations and device.type == "cuda" else None
