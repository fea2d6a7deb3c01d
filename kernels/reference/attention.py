"""Softmax attention in plain torch: see kernels/attention.py."""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, batch: int) -> Tensor:
    p = _probabilities(q, k, mask, scale).to(q.dtype)
    out = torch.matmul(p, v.unsqueeze(1))  # [batch · groups, heads, queries, d]
    return out.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).contiguous()


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """P [batch · groups, heads, queries, keys], in fp32 (fp64 for fp64)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(precise), k.to(precise).mT.unsqueeze(1)).mul_(scale)
    queries, keys = scores.shape[-2:]
    lowest = torch.finfo(precise).min  # not -inf: a query that sees nothing would be NaN
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask.dtype == torch.bool:
        mask = scores.new_zeros(mask.shape).masked_fill_(~mask, lowest)
    scores.unflatten(0, (len(mask), -1)).add_(mask.unsqueeze(1)).clamp_(min=lowest)
    return torch.softmax(scores, -1)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    p = _probabilities(q, k, mask, scale)
    dout, out = (x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (dout, out))  # [batch · groups, heads, queries, d]
    dp = torch.matmul(dout.to(p.dtype), v.to(p.dtype).mT.unsqueeze(1))
    along = (dout.to(p.dtype) * out).sum(-1, keepdim=True)
    ds = dp.sub_(along).mul_(p).mul_(scale).to(q.dtype)
    dq = torch.matmul(ds, k.unsqueeze(1))
    dk, dv = (torch.matmul(x.flatten(1, 2).mT, y.flatten(1, 2)) for x, y in ((ds, q), (p.to(q.dtype), dout)))
    return dq, dk, dv
