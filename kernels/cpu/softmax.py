"""Softmax in attention and in the loss, with what surrounds it."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.cpu.code import (
    Kernel,
    arguments,
    bf16s,
    exp,
    floats,
    ints,
    larger,
    narrow,
    number,
    octets,
    share,
    thread,
    wide,
)

_LOWEST = np.float32(np.finfo(np.float32).min)
_WHOLE = 64  # elements: what vector code does at a time. A row's rest would be done one by one.


@njit(inline="always")
def _exponentials(scores, row, view, e):
    """e[i] = exp(scores[i] - the largest score that `row` sees), 0 for those it does not see; returns the end of the
    last whole vectors in which it sees one, behind which e is not written.

    `view`: queries, the first one's place, address of the mask or 0: causal; rows of a sequence, the mask's strides.
    """
    query, keys = row % view[0], len(scores)
    if view[2]:
        mask = octets(view[2], row // view[3] * view[4] + (view[1] + query) * view[5], keys)
        for i in range(keys):
            e[i] = scores[i] if mask[i] else _LOWEST
        seen = end = keys
    else:
        seen = view[1] + query + 1
        end = min(keys, (seen + _WHOLE - 1) // _WHOLE * _WHOLE)
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
    a = arguments(pointer, 10)
    keys, view = a[3], a[4:]
    e = np.empty(keys, np.float32)  # and not in the place of scores: these have left the processor's nearest cache
    first, behind = share(a[2])
    for row in range(first, behind):
        scores, p = floats(a[0], row * keys, keys), bf16s(a[1], row * keys, keys)
        end = _exponentials(scores, row, view, e)
        total = np.float32(0.0)
        for i in range(end):
            total += e[i]
        scale = np.float32(1.0) / total
        for i in range(end):
            p[i] = narrow(e[i] * scale)
        behind_end = p[end:]
        for i in range(len(behind_end)):
            behind_end[i] = np.uint16(0)


def _view(rows: int, queries: int, start: int, mask: Tensor | None) -> tuple[int, ...]:
    if mask is None:
        return queries, start, 0, 1, 0, 0
    return queries, start, mask.data_ptr(), rows // len(mask), mask.stride(0), mask.stride(2)


def probabilities(scores: Tensor, queries: int, start: int, mask: Tensor | None = None) -> Tensor:
    """Softmax: bf16 as scores, fp32 [groups of all sequences, heads · queries, keys].

    Query `start` + i, in row i of each head, sees what the mask says, bool [batch, 1, all queries, keys], dense in its
    last dimension; without one the keys up to its own place.
    """
    p = torch.empty_like(scores, dtype=torch.bfloat16)
    rows = scores.numel() // scores.shape[-1]
    _probabilities(scores, p, rows, scores.shape[-1], *_view(rows, queries, start, mask))
    return p


@Kernel
def _scores_backward(pointer):
    a = arguments(pointer, 13)
    keys, factor, view = a[5], number(a[6]), a[7:]
    e = np.empty(keys, np.float32)
    first, behind = share(a[4])
    for row in range(first, behind):
        at = row * keys
        scores, dp = floats(a[0], at, keys), floats(a[1], at, keys)
        p, ds = bf16s(a[2], at, keys), bf16s(a[3], at, keys)
        end = _exponentials(scores, row, view, e)
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


def scores_backward(
    scores: Tensor, dp: Tensor, queries: int, start: int, factor: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(P as `probabilities` gives it, factor · P ⊙ (dP − Σ P ⊙ dP)), bf16 as scores and dp, fp32."""
    p, ds = (torch.empty_like(scores, dtype=torch.bfloat16) for _ in range(2))
    rows, keys = scores.numel() // scores.shape[-1], scores.shape[-1]
    _scores_backward(scores, dp, p, ds, rows, keys, factor, *_view(rows, queries, start, mask))
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
    [rows].

    Raises:
        IndexError: a target that is no class.
    """
    if targets.numel() and not 0 <= targets.min().item() <= targets.max().item() < logits.shape[1]:
        raise IndexError(f"a target is not in [0, {logits.shape[1]})")
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    buffer = logits.new_empty(torch.get_num_threads(), logits.shape[1], dtype=torch.float32)
    _cross_entropy(logits, targets, loss, buffer, *logits.shape)
    return loss
