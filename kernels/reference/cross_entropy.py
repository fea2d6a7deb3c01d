"""Cross-entropy of the logits of a linear in plain torch: see kernels/cross_entropy.py."""

import functools

import torch
from torch import Tensor

from kernels.cross_entropy import IGNORED, by_chunks, precise


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ cross-entropy of logits [rows, vocabulary], in fp32 (fp64 for fp64); they become their gradient."""
    x, targets = logits.to(precise(logits)), targets.unsqueeze(1)
    ignored = targets == IGNORED
    targets = targets.masked_fill(ignored, 0)
    p = torch.softmax(x, 1)
    loss = (x.amax(1) - p.amax(1).log() - x.gather(1, targets).squeeze(1)).masked_fill(ignored.squeeze(1), 0).sum()
    logits.copy_(p.scatter_add_(1, targets, p.new_full(targets.shape, -1.0)).masked_fill_(ignored, 0))
    return loss


linear_cross_entropy = functools.partial(by_chunks, _loss)
