"""Compute a function of rows a part of the rows at a time, for long texts."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules import seeds


def in_parts(compute: Callable[..., Tensor], tensors: tuple[Tensor, ...], tokens: int, random: bool = False) -> Tensor:
    """`compute(*tensors)` for so many tokens at a time. Of a part backward keeps the inputs alone, and computes again.

    Args:
        compute: gives a row for each row of the tensors [..., tokens, width], which depends on that row alone.
        random: it draws random numbers.
    """
    # not slices, whose gradients would each be as large as the tensor
    parts = list(zip(*(tensor.flatten(0, -2).split(tokens) for tensor in tensors)))
    if len(parts) == 1:
        return compute(*tensors)
    about = {"use_reentrant": False, "preserve_rng_state": random, "context_fn": seeds.kept}
    again = torch.is_grad_enabled()
    done = [checkpoint(compute, *part, **about) if again else compute(*part) for part in parts]
    return torch.cat(done).view(*tensors[0].shape[:-1], -1)
