"""The adapter that comes nearest to what full fine-tuning made of a weight, W → W′, both [out, in].

LoRA   s·BA = the r principal components of W′ − W: nothing of rank r is nearer
DoRA   m/‖V‖ ⊙ V with V = W + s·BA, the norm taken per row. Rows c ⊙ W′ have the same direction whatever their
       scales c, so those are sought for which c ⊙ W′ − W is best cut to rank r: from c = 1, which is LoRA's BA, and
       from the c that brings each row nearest to W's; then in turns BA for c, and m and c for BA
"""

import torch
from torch import Tensor

from modules.adapters.decompose import decompose

DORA_TURNS, DORA_TOLERANCE = 8, 1e-2  # stop when a turn lowers the squared error by less than this share
TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def extract_lora(w: Tensor, tuned: Tensor, rank: int, method: str = "svd") -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) with BA ≈ `tuned` − `w`, in fp32.

    Args:
        w, tuned: [out, in], any float dtype.
        rank, method: see `modules.adapters.decompose`.

    Raises:
        ValueError: shapes that differ, and what `decompose` refuses.
    """
    _check(w, tuned)
    return decompose(tuned.float() - w.float(), rank, method)


@torch.no_grad()
def extract_dora(w: Tensor, tuned: Tensor, rank: int, method: str = "svd") -> tuple[Tensor, Tensor, Tensor]:
    """(A [rank, in], B [out, rank], m [out]) with m/‖V‖ ⊙ V ≈ `tuned`, V = `w` + BA, in fp32.

    Never further from `tuned` than `extract_lora`'s W + BA. Arguments and errors as there.
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
        raise ValueError(f"the weight is {list(w.shape)} but the tuned one {list(tuned.shape)}")
