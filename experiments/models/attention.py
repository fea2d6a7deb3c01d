"""Attention of many queries on a CPU, with the precision of torch's kernel in a fraction of its time.

    P = softmax(scale · QKᵀ + mask),  O = P V
    dV = Pᵀ dO,  dS = scale · P ⊙ (dO Vᵀ − Σ_d dO ⊙ O),  dQ = dS K,  dK = dSᵀ Q

As in torch's (Dao 2023, FlashAttention-2, §3.1), scores, P and dO Vᵀ are fp32, the other products run in the compute
dtype, and backward computes P again. Here each product is the library's own, of all heads and a block of
queries at once. Queries that share keys and values (GQA) are rows of the same product. Not materialised: scores of more
queries than a block, repeated keys and values, keys to the right of a causal block. It is an op, so that torch.compile
leaves it as it is.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kernels import cpu
from kernels.library import define_op, register_autograd, register_fake

NAME = "blocked_on_cpu"
BLOCK = 128  # queries
BLOCK_BYTES = 2**24  # of fp32 scores, unless 16 queries have more


def _block(q: Tensor, keys: int) -> int:
    """Queries at once."""
    return min(BLOCK, max(16, BLOCK_BYTES // (4 * keys * q.shape[0] * q.shape[1])))


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Queries of x [groups, heads, queries, d] as rows of one matrix a group: [groups, heads · (stop - start), d]."""
    return x[:, :, start:stop].flatten(1, 2)


@contextlib.contextmanager
def _bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """oneDNN instead of MKL for fp32 products of what are bf16 values, with bf16 instructions if it likes: they would
    round nothing. On processors that are not Intel's it takes half of MKL's time even in fp32."""
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
    return q.is_cpu and q.dtype == torch.bfloat16 and cpu.available()


def _probabilities(scores: Tensor, heads: int, mask: Tensor | None, start: int) -> Tensor:
    """P of scores [groups, heads · queries, keys] that begin at query `start`, which are overwritten."""
    scores = scores.unflatten(1, (heads, -1))
    queries, keys = scores.shape[-2:]
    lowest = torch.finfo(scores.dtype).min  # not -inf: a query that sees nothing would be NaN
    if mask is None:
        scores[..., start:] += torch.full((queries, queries), lowest, dtype=scores.dtype).triu_(1)
    else:
        seen = mask[..., start : start + queries, :keys]  # [batch, 1, queries, keys]
        if seen.dtype == torch.bool:
            seen = torch.where(seen, 0.0, lowest)
        scores.view(seen.shape[0], -1, queries, keys).add_(seen).clamp_(min=lowest)
    return torch.softmax(scores.flatten(1, 2), -1)


@define_op("blocked_attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, batch: int) -> Tensor:
    """q [batch · groups, heads of a group, queries, d], k and v [batch · groups, keys, d], mask as `attention` has it.

    The result is [batch, queries, groups, heads, d]: what the model's next linear reads and keeps.
    """
    groups, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, groups // batch, heads, v.shape[-1])
    wide_k = k.to(torch.promote_types(q.dtype, torch.float32))
    step = _block(q, k.shape[1])
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        seen = stop if mask is None else k.shape[1]
        rows = _rows(q, start, stop).to(wide_k.dtype)
        with _bf16_products(q.dtype):
            scores = _scores(rows, wide_k[:, :seen], scale)
        if _kernel_takes(q, mask):
            p = cpu.softmax.probabilities(scores, stop - start, start, mask)
        else:
            p = _probabilities(scores, heads, mask, start).to(q.dtype)
        rows = torch.bmm(p, v[:, :seen]).view(batch, -1, heads, stop - start, v.shape[-1])
        out[:, start:stop] = rows.permute(0, 3, 1, 2, 4)
    return out


@register_fake("blocked_attention")
def _(q, k, v, mask, scale, batch):
    groups, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, groups // batch, heads, v.shape[-1])


@define_op("blocked_attention_backward")
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, queries = q.shape[1:3]
    precise = torch.promote_types(q.dtype, torch.float32)
    wide_k, wide_v = k.to(precise), v.to(precise)
    by_kernel = _kernel_takes(q, mask)
    dout = dout.permute(0, 2, 3, 1, 4).flatten(0, 1)
    step = _block(q, k.shape[1])
    starts = range(0, queries, step)
    sums = q.dtype if len(starts) == 1 else precise  # what dk and dv are added up in
    dq, dk, dv = torch.empty_like(q), None, None
    for start in reversed(starts):  # the last block sees all keys
        stop = min(start + step, queries)
        seen = stop if mask is None else k.shape[1]
        rows, drows = _rows(q, start, stop), _rows(dout, start, stop)
        wide = drows.to(precise)
        with _bf16_products(q.dtype):
            scores = _scores(rows.to(precise), wide_k[:, :seen], scale)
            dp = torch.bmm(wide, wide_v[:, :seen].mT)
        if by_kernel:
            p, ds = cpu.softmax.scores_backward(scores, dp, stop - start, start, scale, mask)
        else:
            p = _probabilities(scores, heads, mask, start)
            along = (wide * _rows(out.permute(0, 2, 3, 1, 4).flatten(0, 1), start, stop)).sum(-1, keepdim=True)
            ds = dp.sub_(along).mul_(p).mul_(scale).to(q.dtype)
        dq[:, :, start:stop] = torch.bmm(ds, k[:, :seen]).unflatten(1, (heads, -1))
        dk_block, dv_block = torch.bmm(ds.mT, rows), torch.bmm(p.to(q.dtype).mT, drows)
        if dk is None:
            dk, dv = dk_block.to(sums), dv_block.to(sums)
        else:
            dk[:, :seen] += dk_block
            dv[:, :seen] += dv_block
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@register_fake("blocked_attention_backward")
def _(dout, q, k, v, mask, out, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, out):
    q, k, v, mask, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, mask, out)


def _backward(ctx, dout):
    return *_attention_backward(dout, *ctx.saved_tensors, ctx.scale), None, None, None


register_autograd("blocked_attention", _backward, _setup_context)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention.

    Args:
        q: [batch, heads, queries, d]. k, v: [batch, groups, keys, d], groups dividing heads.
        mask: bool [batch, 1, queries, keys], True where a query sees a key, or floats to add to the scores; None: a
            query sees the keys up to its own place.

    Returns:
        [batch, heads, queries, d of v], in memory [batch, queries, heads, d]. Differentiable in q, k and v.
    """
    batch, groups = k.shape[:2]
    q = q.unflatten(1, (groups, -1)).flatten(0, 1)
    out = _attention(q, k.flatten(0, 1), v.flatten(0, 1), mask, scale, batch)
    return out.flatten(2, 3).transpose(1, 2)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, to which everything goes that is not here."""
    batch, _, queries, d = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    fits = causal if attention_mask is None else attention_mask.shape[:3] == (batch, 1, queries)
    ours = fits and query.is_cpu and queries > 1 and dropout == 0.0
    if not ours or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if attention_mask is None:  # of a static cache the rest is still empty
        key, value = key[:, :, :queries], value[:, :, :queries]
    out = attention(query, key, value, attention_mask, d**-0.5 if scaling is None else scaling)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def use_on_cpu(model: PreTrainedModel) -> None:
    """Have `model` compute attention here while it is on a CPU, if it would call torch's kernel."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
