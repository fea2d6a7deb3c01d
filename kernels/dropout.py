"""Dropout whose mask is a function of a seed, so that backward makes it again instead of storing it.

    keep[t, k] = mix(mix(k) ^ mix(t ^ mix(seed))) >= p · 2³²

`mix` is a 32-bit integer hash (two multiply-xorshift rounds, the constants found by Ellis Wellons' "hash prospector"
search for low bias). Its three lines are the same here in torch and in
triton/dropout.py, so all columns drop the same elements.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """A random int64 [] in [0, 2³²) from torch's generator, so that `torch.manual_seed` decides it."""
    return torch.randint(_MASK32, (), device=device)


def seed_of(seed: Tensor | None, part: int) -> Tensor | None:
    """The seed of one part of what `seed` drops, as one expert of a layer is."""
    return None if seed is None else (seed + part) & _MASK32


def threshold(p: float) -> int:
    """Hashes below it are dropped."""
    return int(p * 2**32)


def _mix(h: Tensor) -> Tensor:
    """32-bit hash of int64 values in [0, 2³²)."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK32
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)


def keep_mask(rows: int, cols: int, p: float, seed: Tensor) -> Tensor:
    """bool [rows, cols], True with probability 1 - p."""
    row = _mix(torch.arange(rows, device=seed.device) ^ _mix(seed))
    col = _mix(torch.arange(cols, device=seed.device))
    return _mix(col ^ row.unsqueeze(1)) >= threshold(p)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x [rows, cols] with dropped elements zero and the others divided by 1 - p."""
    if p == 0.0:
        return x
    return torch.where(keep_mask(*x.shape, p, seed), x * (1 / (1 - p)), 0)
