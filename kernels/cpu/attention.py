"""Softmax attention on a CPU, a block of queries at a time: see kernels/attention.py.

Each product is the library's own, of all heads and a block of queries at once. Not materialised: scores of more queries
than a block, or of keys before the first or behind the last that a query of the block sees. So samples laid end to end
cost little more than the samples one by one. In bf16 one pass over the scores is the softmax with its mask.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import rows
from kernels.cpu.numba_tools import Kernel, arguments, bf16s, exp, floats, larger, narrow, number, octets, share

BLOCK = 128  # queries
BLOCK_BYTES = 2**24  # of fp32 scores, unless 16 queries have more
_LOWEST = np.float32(np.finfo(np.float32).min)
_WHOLE = 64  # elements: vector code does so many at a time. A row's rest would be done one by one.


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, batch: int) -> Tensor:
    groups, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, groups // batch, heads, v.shape[-1])
    wide_k = k.to(torch.promote_types(q.dtype, torch.float32))
    step = _block(q, k.shape[1])
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        seen, mask_seen = _seen(mask, start, stop, k.shape[1])
        with _bf16_products(q.dtype):
            scores = _scores(rows(q, start, stop).to(wide_k.dtype), wide_k[:, seen], scale)
        if _kernel_takes(q, mask):
            p = probabilities(scores, stop - start, start, mask_seen)
        else:
            p = _probabilities_in_torch(scores, heads, mask_seen, start).to(q.dtype)
        o = torch.bmm(p, v[:, seen]).view(batch, -1, heads, stop - start, v.shape[-1])
        out[:, start:stop] = o.permute(0, 3, 1, 2, 4)
    return out


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, queries = q.shape[1:3]
    precise = torch.promote_types(q.dtype, torch.float32)
    wide_k, wide_v = k.to(precise), v.to(precise)
    dout = dout.permute(0, 2, 3, 1, 4).flatten(0, 1)
    step = _block(q, k.shape[1])
    starts = range(0, queries, step)
    sums = q.dtype if len(starts) == 1 else precise  # what dk and dv are added up in
    dq, dk, dv = q.new_empty(q.shape), None, None
    for start in reversed(starts):
        stop = min(start + step, queries)
        seen, mask_seen = _seen(mask, start, stop, k.shape[1])
        q_rows, dout_rows = rows(q, start, stop), rows(dout, start, stop)
        wide_dout = dout_rows.to(precise)
        with _bf16_products(q.dtype):
            scores = _scores(q_rows.to(precise), wide_k[:, seen], scale)
            dp = torch.bmm(wide_dout, wide_v[:, seen].mT)
        if _kernel_takes(q, mask):
            p, ds = scores_backward(scores, dp, stop - start, start, scale, mask_seen)
        else:
            p = _probabilities_in_torch(scores, heads, mask_seen, start)
            along = (wide_dout * rows(out.permute(0, 2, 3, 1, 4).flatten(0, 1), start, stop)).sum(-1, keepdim=True)
            ds = dp.sub_(along).mul_(p).mul_(scale).to(q.dtype)
        dq[:, :, start:stop] = torch.bmm(ds, k[:, seen]).unflatten(1, (heads, -1))
        dk_block, dv_block = torch.bmm(ds.mT, q_rows), torch.bmm(p.to(q.dtype).mT, dout_rows)
        if dk is None:
            unseen = (0, 0, seen.start, k.shape[1] - seen.stop)
            dk, dv = F.pad(dk_block.to(sums), unseen), F.pad(dv_block.to(sums), unseen)
        else:
            dk[:, seen] += dk_block
            dv[:, seen] += dv_block
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _seen(mask: Tensor | None, start: int, stop: int, keys: int) -> tuple[slice, Tensor | None]:
    """(the keys from the first to the last that any query of a block sees, the mask of these). All keys if a query sees
    none, since it attends to every key alike, and if the mask has no values."""
    if mask is None:
        return slice(0, stop), None
    block = mask[:, 0, start:stop]
    if mask.is_meta or mask.dtype != torch.bool or not block.any(-1).all():
        return slice(0, keys), mask
    columns = block.flatten(0, 1).any(0).nonzero()
    seen = slice(int(columns[0]) // _WHOLE * _WHOLE, int(columns[-1]) + 1)
    return seen, mask[..., seen]


def _block(q: Tensor, keys: int) -> int:
    """Queries at once."""
    return min(BLOCK, max(16, BLOCK_BYTES // (4 * keys * q.shape[0] * q.shape[1])))


@contextlib.contextmanager
def _bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, oneDNN replaces MKL for fp32 products. The inputs hold bf16 values, so oneDNN may use bf16 instructions;
    they round nothing. On processors that are not Intel's it takes half of MKL's time, even in fp32."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale · QKᵀ of rows q, in their dtype: [groups, heads · queries, keys]."""
    scores = q.new_empty(*q.shape[:2], k.shape[1])
    return torch.baddbmm(scores, q, k.mT, beta=0, alpha=scale, out=scores)


def _kernel_takes(q: Tensor, mask: Tensor | None) -> bool:
    if mask is not None and (mask.dtype != torch.bool or mask.stride(-1) != 1):
        return False
    return q.dtype == torch.bfloat16


def _probabilities_in_torch(scores: Tensor, heads: int, mask: Tensor | None, start: int) -> Tensor:
    """P of scores [groups, heads · queries, keys] that begin at query `start`, which are overwritten."""
    scores = scores.unflatten(1, (heads, -1))
    queries, keys = scores.shape[-2:]
    lowest = torch.finfo(scores.dtype).min  # not -inf: a query that sees nothing would be NaN
    if mask is None:
        scores[..., start:] += torch.full((queries, queries), lowest, dtype=scores.dtype, device=scores.device).triu_(1)
    else:
        seen = mask[..., start : start + queries, :keys]  # [batch, 1, queries, keys]
        if seen.dtype == torch.bool:
            seen = scores.new_zeros(seen.shape).masked_fill_(~seen, lowest)
        scores.view(seen.shape[0], -1, queries, keys).add_(seen).clamp_(min=lowest)
    return torch.softmax(scores.flatten(1, 2), -1)


# ------------------------------------------------------------------------------ the softmax in bf16


@njit(inline="always")
def _exponentials(scores, row, view, e):
    """Write e[i] = exp(scores[i] − m) for each key that `row` sees; m is the highest such score. Write 0 for the other
    keys. Return the end of the last whole vector that holds a visible key. e is not written behind it.

    `view` holds: the number of queries, the place of the first query, the address of the mask (0: causal), the rows of
    one sequence, the mask's two strides.
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
    hidden = e[seen:end]  # numba checks another index than the loop's own: no vector code
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
    # a: 0 scores, 1 p (written), 2 rows, 3 keys, 4 … 9 the view (see `_exponentials`)
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
    # a: 0 scores, 1 dp, 2 p and 3 ds (written), 4 rows, 5 keys, 6 factor, 7 … 12 the view (see `_exponentials`)
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
