"""Softmax in attention and in the loss, with what surrounds it."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.cpu.code import Kernel, arguments, bf16s, exp, floats, ints, larger, narrow, number, share, thread, wide

_LOWEST = np.float32(np.finfo(np.float32).min)
_WHOLE = 64  # elements: what vector code does at a time. A row's rest would be done one by one.


@njit(inline="always")
def _exponentials(scores, seen, e):
    """e[i] = exp(scores[i] - the largest of the first `seen` scores), 0 behind them; returns the end of the last whole
    vectors that have one of them, behind which e is not written."""
    end = min(len(scores), (seen + _WHOLE - 1) // _WHOLE * _WHOLE)
    for i in range(end):
        e[i] = scores[i]
    hidden = e[seen:end]  # numba checks other indices than a loop's own for being negative, which is no vector code
    for i in range(len(hidden)):
        hidden[i] = _LOWEST
    highest = _LOWEST
    for i in range(end):
        highest = larger(highest, e[i])
    for i in range(end):
        e[i] = exp(e[i] - highest)
    return end


@Kernel
def _probabilities(pointer):
    a = arguments(pointer, 6)
    keys, queries, start = a[3], a[4], a[5]
    e = np.empty(keys, np.float32)  # and not in the place of scores: these have left the processor's nearest cache
    first, behind = share(a[2])
    for row in range(first, behind):
        scores, p = floats(a[0], row * keys, keys), bf16s(a[1], row * keys, keys)
        end = _exponentials(scores, start + row % queries + 1, e)
        total = np.float32(0.0)
        for i in range(end):
            total += e[i]
        scale = np.float32(1.0) / total
        for i in range(end):
            p[i] = narrow(e[i] * scale)
        behind_end = p[end:]
        for i in range(len(behind_end)):
            behind_end[i] = np.uint16(0)


def probabilities(scores: Tensor, queries: int, start: int) -> Tensor:
    """Causal softmax: bf16 as scores, fp32 [..., heads · queries, keys]. Query `start` + i, in row i of each head, sees
    the keys up to its own place."""
    p = torch.empty_like(scores, dtype=torch.bfloat16)
    _probabilities(scores, p, scores.numel() // scores.shape[-1], scores.shape[-1], queries, start)
    return p


@Kernel
def _scores_backward(pointer):
    a = arguments(pointer, 9)
    keys, queries, start, factor = a[5], a[6], a[7], number(a[8])
    e = np.empty(keys, np.float32)
    first, behind = share(a[4])
    for row in range(first, behind):
        at = row * keys
        scores, dp = floats(a[0], at, keys), floats(a[1], at, keys)
        p, ds = bf16s(a[2], at, keys), bf16s(a[3], at, keys)
        end = _exponentials(scores, start + row % queries + 1, e)
        total, along = np.float32(0.0), np.float32(0.0)
        for i in range(end):
            total += e[i]
            along += e[i] * dp[i]
        scale = np.float32(1.0) / total
        along *= scale
        for i in range(end):
            probability = e[i] * scale
            p[i] = narrow(probability)
            ds[i] = narrow(probability * (dp[i] - along) * factor)
        p_behind, ds_behind = p[end:], ds[end:]
        for i in range(len(p_behind)):
            p_behind[i] = np.uint16(0)
            ds_behind[i] = np.uint16(0)


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
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    buffer = logits.new_empty(torch.get_num_threads(), logits.shape[1], dtype=torch.float32)
    _cross_entropy(logits, targets, loss, buffer, *logits.shape)
    return loss
