"""Rows of tokens sorted by expert, for experts.py, and back. T tokens have k experts each.

    order, ends = route(top_k_index)        pair (t, j) is t·k + j; row i of the sorted rows is pair order[i]
    y_i = x[order[i] // k]                  gather,   dx_t = Σ_j dy_(t,j)
    out_t = Σ_j w_tj · y_(t,j)              combine,  dy_(t,j) = w_tj · dout_t,  dw_tj = dout_t · y_(t,j)

y_(t,j) is the sorted row of the pair. Every sum is in fp32 and goes over j, or over columns, in a fixed order: no
atomics, so two runs give the same bits. The host never waits. Not materialised: the rows in the order of the pairs.
"""

import torch
from torch import Tensor

from kernels.op import define_op


@define_op
def _gather(x: Tensor, order: Tensor, k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@define_op
def _combine(y: Tensor, order: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """[T, H] in y's dtype; without weights all are 1."""
    return y.new_empty(y.shape[0] // k, y.shape[1])


@define_op
def _combine_backward(dout: Tensor, y: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(dy [T·k, H] in y's dtype, dweights [T, k] in that of weights); dout is contiguous."""
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _gather_backward(kept, needs, dy: Tensor) -> dict:
    return {"x": _combine(dy.contiguous(), kept.order, None, kept.k) if needs.x else None}


def _keep(inputs, _) -> dict:
    return {"y": inputs.y, "order": inputs.order, "weights": inputs.weights}


def _backward(kept, needs, dout: Tensor) -> dict:
    dy, dweights = _combine_backward(dout.contiguous(), kept.y, kept.order, kept.weights)
    return {"y": dy if needs.y else None, "weights": dweights if needs.weights else None}


_gather.differentiate(lambda inputs, _: {"order": inputs.order, "k": inputs.k}, _gather_backward)
_combine.differentiate(_keep, _backward)


def rows_of_pairs(order: Tensor, k: int) -> Tensor:
    """The sorted row of each pair [T, k]: the inverse of `order`."""
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return rows.view(-1, k)


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
    return _gather(x, order, k)


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
    return _combine(y.contiguous(), order, weights, weights.shape[1])
