"""The adapter that brings a weight W nearest to W′, the weight after full fine-tuning; both are [out, in].

LoRA   s·BA = the r principal components of W′ − W. No matrix of rank r is nearer
DoRA   m/‖V‖ ⊙ V with V = W + s·BA, the norm taken per row. m sets the length of each row, so BA may aim at c ⊙ W′ for
       any scales c of the rows. Two steps alternate: BA = the r principal components of c ⊙ W′ − W; then the best m
       for this BA, and c from m. The better result of two starts is kept: c = 1, which gives LoRA's BA, and the c that
       brings each row of W′ nearest to W's
"""

import torch
from torch import Tensor

from modules.adapters.decompose import decompose

DORA_TURNS = 8  # at most so many turns from each start
DORA_TOLERANCE = 1e-2  # stop when a turn lowers the squared error by less than this share
TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def nearest_lora(w: Tensor, tuned: Tensor, rank: int, method: str = "svd") -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) with BA ≈ `tuned` − `w`, in fp32.

    Args:
        w, tuned: [out, in], any float dtype.
        rank, method: see `modules.adapters.decompose`.

    Raises:
        ValueError: the shapes differ, or `decompose` refuses the difference.
    """
    _check(w, tuned)
    return decompose(tuned.float() - w.float(), rank, method)


@torch.no_grad()
def nearest_dora(w: Tensor, tuned: Tensor, rank: int, method: str = "svd") -> tuple[Tensor, Tensor, Tensor]:
    """(A [rank, in], B [out, rank], m [out]) with m/‖V‖ ⊙ V ≈ `tuned`, V = `w` + BA, in fp32.

    It is never further from `tuned` than W + BA of `nearest_lora`, which has the same arguments and errors.
    """
    _check(w, tuned)
    w, tuned = w.float(), tuned.float()
    aligned = (tuned * w).sum(dim=1, keepdim=True) / tuned.square().sum(dim=1, keepdim=True).clamp(min=TINY)
    best, least = None, torch.inf
    for target in (tuned, aligned * tuned):
        error = torch.inf
        for _ in range(DORA_TURNS):
            lora_A, lora_B = decompose(target - w, rank, method)
            v = w + lora_B @ lora_A
            norm_sq = v.square().sum(dim=1).clamp(min=TINY)
            gain = (tuned * v).sum(dim=1) / norm_sq  # the best m/‖V‖ of each row
            before, error = error, (tuned - gain[:, None] * v).square().sum().item()
            if best is None or error < least:
                best, least = (lora_A, lora_B, gain * norm_sq.sqrt()), error
            if error > (1 - DORA_TOLERANCE) * before:
                break
            target = torch.where(gain != 0, 1 / gain, 0.0)[:, None] * tuned
    return best


def _check(w: Tensor, tuned: Tensor) -> None:
    if w.shape != tuned.shape:
        raise ValueError(f"the weight is {list(w.shape)}, but the tuned weight is {list(tuned.shape)}")
