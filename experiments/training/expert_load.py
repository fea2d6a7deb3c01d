"""How many tokens each expert of a mixture gets, counted while a model is evaluated."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.system import parallel
from modules.mixtures import experts_modules


class ExpertLoad:
    """Counts tokens inside `counting`.

    Attributes:
        counts: int64 [experts], tokens so far, of each layer of experts by its full name.
    """

    def __init__(self, model: nn.Module):
        self.layers = dict(experts_modules(model))
        self.counts = {
            name: torch.zeros(layer.num_experts, dtype=torch.int64, device=model.device)
            for name, layer in self.layers.items()
        }

    @contextlib.contextmanager
    def counting(self, mask: Tensor) -> Iterator[None]:
        """Inside, the model sees a batch whose tokens count where `mask` [B, T] is 1."""
        hooks = [
            layer.register_forward_pre_hook(functools.partial(self._count, name, mask), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, name: str, mask: Tensor, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        experts = layer.num_experts
        top_k_index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        if top_k_index is None:  # Llama 4 shows all tokens to all experts, as zeros to those that do not compute them
            hidden_states = kwargs.get("hidden_states", args[0] if args else None)
            chosen = hidden_states.view(experts, -1, hidden_states.shape[-1]).ne(0).any(-1).T
            self.counts[name] += (chosen & _real(mask, len(chosen))).sum(0)
            return
        expert = top_k_index.reshape(-1, top_k_index.shape[-1]).long()
        nobody = (expert < 0) | (expert >= experts) | ~_real(mask, len(expert))
        self.counts[name] += torch.bincount(expert.masked_fill(nobody, experts).view(-1), minlength=experts + 1)[:-1]

    def total(self) -> dict[str, list[int]]:
        """The counts of all processes together; each must call it."""
        sums = iter(parallel.total(*(n for counts in self.counts.values() for n in counts.tolist())))
        return {name: [int(next(sums)) for _ in counts] for name, counts in self.counts.items()}


def _real(mask: Tensor, tokens: int) -> Tensor:
    """bool [tokens, 1]: not padding, which is on the right of a row. Tokens that a prefix adds to each row are real."""
    more = tokens // len(mask) - mask.shape[1]
    return F.pad(mask, (more, 0), value=1).bool().view(-1, 1)
