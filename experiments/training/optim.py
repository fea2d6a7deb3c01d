"""The optimizer that a configuration names, and room for a step when memory runs out beside it."""

from collections.abc import Callable
from typing import TypeVar

import torch

from experiments.config import Config
from experiments.errors import UserError
from experiments.system import parallel
from modules import AdamW, AdamW8bit, Paging

OPTIMIZERS = {"adamw": AdamW, "adamw8bit": AdamW8bit}
T = TypeVar("T")


def make_optimizer(cfg: Config, groups: list[dict], capturable: bool = False) -> AdamW:
    """`cfg.optim` over the parameters of `groups`. Pages that fit neither budget go to a file in `cfg.output_dir`,
    which has no name there and vanishes with the process.

    Args:
        capturable: lr and the count of steps are on the device.

    Raises:
        UserError: no room for that file.
    """
    paging = None
    if cfg.optim.paged:
        host_bytes = None if cfg.optim.host_mb is None else cfg.optim.host_mb * 2**20
        paging = Paging(cfg.optim.budget_mb * 2**20, cfg.output_dir, host_bytes)
    try:
        more = {"weight_decay": cfg.trainer.weight_decay, "paging": paging, "capturable": capturable}
        return OPTIMIZERS[cfg.optim.name](groups, cfg.lr, **more)
    except OSError as error:
        raise UserError(
            f"no room for the optimizer's pages in {cfg.output_dir} ({error.strerror}): set output_dir to a folder "
            "on a larger disk, or raise optim.budget_mb"
        ) from error


def with_room(optimizer: AdamW, device: torch.device, compute: Callable[[], T]) -> T:
    """`compute()`, which adds to gradients that are None before. Where device memory runs out, paged optimizer state
    leaves the device and all is computed once more from the same random numbers: the result is what it would have been.
    """
    random_states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        return compute()
    except torch.OutOfMemoryError:
        if parallel.size() > 1 or not optimizer.evict():  # the other processes do not compute theirs again
            raise
    # Only here, outside of the handler, are the activations of the pass that failed gone.
    optimizer.zero_grad(set_to_none=True)
    torch.set_rng_state(random_states[0])
    if random_states[1] is not None:
        torch.cuda.set_rng_state(random_states[1], device)
    return compute()
