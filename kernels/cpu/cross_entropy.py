"""Cross-entropy of the logits of a linear on a CPU: see kernels/cross_entropy.py."""

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import supports
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, exp, floats, ints, larger, narrow, share, thread, wide
from kernels.cross_entropy import IGNORED, by_chunks, precise

FP32_BYTES = 2**22  # of fp32 softmax: it stays in a CPU's cache
_LOWEST = np.float32(np.finfo(np.float32).min)


@Kernel
def _cross_entropy(pointer):
    # a: 0 logits (become their gradient), 1 targets, 2 loss (written), 3 a buffer of `classes` values a thread, 4 rows,
    #    5 classes
    a = arguments(pointer, 6)
    rows, classes = a[4], a[5]
    targets, loss, e = ints(a[1], 0, rows), floats(a[2], 0, rows), floats(a[3], thread() * classes, classes)
    first, behind = share(rows)
    for row in range(first, behind):
        x = bf16s(a[0], row * classes, classes)
        target = targets[row]
        if target == IGNORED:
            loss[row] = np.float32(0.0)
            for i in range(classes):
                x[i] = np.uint16(0)
            continue
        highest = _LOWEST
        for i in range(classes):
            highest = larger(highest, wide(x[i]))
        total = np.float32(0.0)
        for i in range(classes):
            e[i] = exp(wide(x[i]) - highest)
            total += e[i]
        loss[row] = np.log(total) + highest - wide(x[target])
        scale = np.float32(1.0) / total
        p = e[target] * scale
        for i in range(classes):
            x[i] = narrow(e[i] * scale)
        x[target] = narrow(p - np.float32(1.0))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row in nats, fp32 [rows]. logits bf16 [rows, classes] become their gradient; targets int64
    [rows], IGNORED among them.

    Raises:
        IndexError: a target that is no class.
    """
    known = targets.masked_fill(targets == IGNORED, 0)
    if known.numel() and not 0 <= known.min().item() <= known.max().item() < logits.shape[1]:
        raise IndexError(f"a target is not in [0, {logits.shape[1]})")
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    buffer = logits.new_empty(torch.get_num_threads(), logits.shape[1], dtype=torch.float32)
    _cross_entropy(logits, targets, loss, buffer, *logits.shape)
    return loss


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ cross-entropy of logits [rows, vocabulary], in fp32 (fp64 for fp64); they become their gradient."""
    if supports(logits):
        return cross_entropy(logits, targets).sum()
    loss = torch.zeros((), dtype=precise(logits), device=logits.device)
    rows = max(1, FP32_BYTES // (4 * logits.shape[1]))
    ignored = (targets == IGNORED).unsqueeze(1)
    targets = targets.unsqueeze(1).masked_fill(ignored, 0)
    for part, target, left_out in zip(logits.split(rows), targets.split(rows), ignored.split(rows)):
        x = part.to(precise(logits))
        p = torch.softmax(x, 1)
        logsumexp = x.amax(1) - p.amax(1).log()
        loss += (logsumexp - x.gather(1, target).squeeze(1)).masked_fill(left_out.squeeze(1), 0).sum()
        part.copy_(p.scatter_add_(1, target, p.new_full(target.shape, -1.0)).masked_fill_(left_out, 0))
    return loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (needs_dhidden, needs_dweight, needs_dbias)
    return by_chunks(_loss, hidden, weight, bias, targets, *needs)
