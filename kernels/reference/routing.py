"""Rows of tokens sorted by expert, and back, in plain torch: see kernels/routing.py."""

import torch
from torch import Tensor

from kernels.routing import rows_of_pairs


def gather(x: Tensor, order: Tensor, k: int) -> Tensor:
    return x.index_select(0, order // k)


def combine(y: Tensor, order: Tensor, weights: Tensor | None, k: int) -> Tensor:
    rows = rows_of_pairs(order, k)
    out = y.new_zeros(len(rows), y.shape[1], dtype=torch.float32)
    for j in range(k):
        of_pair = y.index_select(0, rows[:, j])
        out += of_pair if weights is None else of_pair * weights[:, j : j + 1].float()
    return out.to(y.dtype)


def combine_backward(dout: Tensor, y: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    k = weights.shape[1]
    rows, wide = rows_of_pairs(order, k), dout.float()
    dy = wide.index_select(0, order // k) * weights.float().view(-1, 1).index_select(0, order)
    dweights = [(wide * y.index_select(0, rows[:, j])).sum(1) for j in range(k)]
    return dy.to(y.dtype), torch.stack(dweights, 1).to(weights.dtype)
