"""Softmax in attention and in the loss, with what surrounds it."""

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.code import Kernel, arguments, bf16s, exp, floats, ints, larger, narrow, number, share, thread, wide

_LOWEST = np.float32(np.finfo(np.float32).min)  # not -inf: a query that sees nothing would be NaN


@Kernel
def _probabilities(pointer):
    a = arguments(pointer, 6)
    keys, queries, start = a[3], a[4], a[5]
    first, behind = share(a[2])
    for row in range(first, behind):
        scores, p = floats(a[0], row * keys, keys), bf16s(a[1], row * keys, keys)
        seen = start + row % queries + 1
        highest = _LOWEST
        for i in range(seen):
            highest = larger(highest, scores[i])
        total = np.float32(0.0)
        for i in range(seen):
            scores[i] = exp(scores[i] - highest)
            total += scores[i]
        scale = np.float32(1.0) / total
        for i in range(seen):
            p[i] = narrow(scores[i] * scale)
        for i in range(keys - seen):
            p[seen + i] = np.uint16(0)


def probabilities(scores: Tensor, queries: int, start: int) -> Tensor:
    """Causal softmax: bf16 as scores, fp32 [..., heads · queries, keys], which are overwritten. Query `start` + i, in
    row i of each head, sees the keys up to its own place."""
    p = torch.empty_like(scores, dtype=torch.bfloat16)
    _probabilities(scores, p, scores.numel() // scores.shape[-1], scores.shape[-1], queries, start)
    return p


@Kernel
def _scores_backward(pointer):
    a = arguments(pointer, 9)
    keys, queries, start, factor = a[5], a[6], a[7], number(a[8])
    first, behind = share(a[4])
    for row in range(first, behind):
        at = row * keys
        scores, dp = floats(a[0], at, keys), floats(a[1], at, keys)
        p, ds = bf16s(a[2], at, keys), bf16s(a[3], at, keys)
        seen = start + row % queries + 1
        highest = _LOWEST
        for i in range(seen):
            highest = larger(highest, scores[i])
        total, along = np.float32(0.0), np.float32(0.0)
        for i in range(seen):
            e = exp(scores[i] - highest)
            scores[i] = e
            total += e
            along += e * dp[i]
        scale = np.float32(1.0) / total
        along *= scale
        for i in range(seen):
            probability = scores[i] * scale
            p[i] = narrow(probability)
            ds[i] = narrow(probability * (dp[i] - along) * factor)
        for i in range(keys - seen):
            p[seen + i] = np.uint16(0)
            ds[seen + i] = np.uint16(0)


def scores_backward(scores: Tensor, dp: Tensor, queries: int, start: int, factor: float) -> tuple[Tensor, Tensor]:
    """(P as `probabilities` gives it, factor · P ⊙ (dP − Σ P ⊙ dP)), bf16 as scores and dp, fp32."""
    p, ds = (torch.empty_like(scores, dtype=torch.bfloat16) for _ in range(2))
    rows, keys = scores.numel() // scores.shape[-1], scores.shape[-1]
    _scores_backward(scores, dp, p, ds, rows, keys, queries, start, factor)
    return p, ds


@Kernel
def _cross_entropy(pointer):
    a = arguments(pointer, 6)
    rows, classes = a[4], a[5]
    targets, loss, e = ints(a[1], 0, rows), floats(a[2], 0, rows), floats(a[3], thread() * classes, classes)
    first, behind = share(rows)
    for row in range(first, behind):
        x = bf16s(a[0], row * classes, classes)
        highest = _LOWEST
        for i in range(classes):
            highest = larger(highest, wide(x[i]))
        total = np.float32(0.0)
        for i in range(classes):
            e[i] = exp(wide(x[i]) - highest)
            total += e[i]
        target = targets[row]
        loss[row] = np.log(total) + highest - wide(x[target])
        scale = np.float32(1.0) / total
        p = e[target] * scale
        for i in range(classes):
            x[i] = narrow(e[i] * scale)
        x[target] = narrow(p - np.float32(1.0))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row in nats, fp32 [rows]. logits bf16 [rows, classes] become their gradient; targets int64
    [rows]."""
    loss = torch.empty(len(logits), dtype=torch.float32)
    buffer = torch.empty(torch.get_num_threads(), logits.shape[1], dtype=torch.float32)
    _cross_entropy(logits, targets, loss, buffer, *logits.shape)
    return loss
