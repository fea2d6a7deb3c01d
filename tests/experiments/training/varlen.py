"""torch's attention for texts of several lengths, by its documentation, in float64. It needs no GPU."""

import torch
from torch import Tensor


def varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """q: [T, heads, d]; k and v: [T, groups, d]."""
    assert enable_gqa and cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and max_q == max_k
    places = torch.arange(len(q), dtype=torch.int32)
    sample = torch.searchsorted(cu_seq_q, places, right=True)
    apart = places[:, None] - places[None]
    left, right = window_size
    seen = (sample[:, None] == sample[None]) & (apart >= -right)
    if left >= 0:
        seen &= apart <= left
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, v).to(q.dtype)
