"""Rows of tokens sorted by expert, for experts.py, and back. T tokens have k experts each.

    order, ends = route(top_k_index)        pair (t, j) is t·k + j; row i of the sorted rows is pair order[i]
    x[order // k]                           gather: its backward sums over each token's k rows
    out_t = Σ_j weights[t, j] · y_(t,j)     combine

Every sum is in fp32 and goes over j in order: no atomics, so two runs give the same bits. The host never waits.
"""

import torch
from torch import Tensor


def route(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs of tokens and experts by expert; those of one expert stay in their order.

    Args:
        top_k_index: integers [T, k], the experts of each token. A pair whose expert is not in 0 … experts - 1 belongs
            to nobody and comes last, as expert parallelism marks experts of other processes.

    Returns:
        (order int64 [T·k]: row i of the sorted rows is pair order[i]; ends int32 [experts]).

    Raises:
        ValueError: not [T, k] of integers.
    """
    if top_k_index.dim() != 2 or top_k_index.is_floating_point():
        raise ValueError(f"top_k_index {tuple(top_k_index.shape)} of {top_k_index.dtype} must be integers [tokens, k]")
    expert = top_k_index.reshape(-1).long()
    expert = expert.masked_fill(expert < 0, experts)
    expert, order = expert.sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True)
    return order, ends.int()


def gather(x: Tensor, order: Tensor, k: int) -> Tensor:
    """The sorted rows [T·k, H] of x [T, H]: row i is that of token order[i] // k. Differentiable in x.

    Raises:
        ValueError: x that is not [T, H], or an order that is not [T·k].
    """
    if x.dim() != 2 or order.shape != (x.shape[0] * k,):
        raise ValueError(f"x {tuple(x.shape)} and order {tuple(order.shape)} must be [tokens, size] and [tokens · {k}]")
    return _Gather.apply(x, order, k)


def combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The sum [T, H] of each token's k rows of y [T·k, H], which are sorted, with its weights [T, k].

    Returns:
        in y's dtype, summed in fp32. Differentiable in y and weights.

    Raises:
        ValueError: shapes that do not fit.
    """
    if weights.dim() != 2 or y.dim() != 2 or not len(y) == len(order) == weights.numel():
        raise ValueError(
            f"y {tuple(y.shape)}, order {tuple(order.shape)} and weights {tuple(weights.shape)} must be "
            "[tokens · k, size], [tokens · k] and [tokens, k]"
        )
    return _Combine.apply(y, order, weights)


def _rows_of_pairs(order: Tensor, k: int) -> Tensor:
    """The sorted row of each pair [T, k]: the inverse of `order`."""
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return rows.view(-1, k)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (order,) = ctx.saved_tensors
        rows = _rows_of_pairs(order, ctx.k)
        dx = dy.index_select(0, rows[:, 0]).float()
        for j in range(1, ctx.k):
            dx += dy.index_select(0, rows[:, j])
        return dx.to(dy.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, order, weights)
        rows, factors = _rows_of_pairs(order, weights.shape[1]), weights.float()
        out = y.index_select(0, rows[:, 0]) * factors[:, :1]
        for j in range(1, weights.shape[1]):
            out += y.index_select(0, rows[:, j]) * factors[:, j : j + 1]
        return out.to(y.dtype)

    @staticmethod
    def backward(ctx, dout: Tensor):
        y, order, weights = ctx.saved_tensors
        dy = dweights = None
        k = weights.shape[1]
        if ctx.needs_input_grad[0]:
            dy = (dout.index_select(0, order // k) * weights.float().view(-1, 1)[order]).to(y.dtype)
        if ctx.needs_input_grad[2]:
            rows, wide = _rows_of_pairs(order, k), dout.float()
            each = [(wide * y.index_select(0, rows[:, j])).sum(1) for j in range(k)]
            dweights = torch.stack(each, 1).to(weights.dtype)
        return dy, None, dweights
