"""The norms of DoRA, ‖W + sBA‖, computed once for several passes over the same weights.

Batches whose gradients are accumulated see the same weights, and so does the forward pass that checkpointing computes
again. A layer cannot know that: an optimizer that writes through `.data`, FSDP's gathering and a CUDA graph change
weights, but not their version. So the loop that steps the optimizer says it:

    norms = Norms(model)
    for group in groups:
        with norms.kept():              # nothing may change weights inside
            for batch in group:
                loss(batch).backward()
        optimizer.step()
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modules.linear import DoRALinear, weight_of


class Norms:
    """The norms of the DoRALinear layers of `model`.

    Attributes:
        values: fp32 [out] of each layer whose forward has run inside `kept`.
    """

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if isinstance(module, DoRALinear)]
        self.values: dict[DoRALinear, Tensor] = {}

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, the first forward in training mode of each layer computes its norm, and the others use that."""
        with self.used():
            try:
                yield
            finally:
                self.values.clear()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """As `kept`, but the norms stay and are used the next time: call `refresh` whenever weights have changed."""
        for layer in self.layers:
            layer.kept_norms = self.values
        try:
            yield
        finally:
            for layer in self.layers:
                layer.kept_norms = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the norms of `values` again, in their memory, to which a CUDA graph refers."""
        for layer, norm in self.values.items():
            norm.copy_(layer.norm(weight_of(layer.base)))
