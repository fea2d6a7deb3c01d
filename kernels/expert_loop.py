"""One expert after another: how a column without grouped kernels computes the ops of experts.py.

Each function takes the column's own functions for one linear, then the arguments of the op. Only experts that have rows
are looked at, and one of them at a time is dense. An expert is then a linear of its rows, with the dropout seed of
`seed_of`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.dropout import seed_of
from kernels.weight import Weight, holding


def with_rows(ends: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of the experts that have rows.

    Raises:
        ValueError: ends that fall, or that are more than `rows`.
    """
    start, limits = 0, ends.tolist()
    for e, end in enumerate(limits):
        if not start <= end <= rows:
            raise ValueError(f"ends[{e}] is {end} after {start}: ends must not fall nor pass the {rows} rows of x")
        if end > start:
            yield e, slice(start, end)
        start = end


def dense_expert(dense: Callable, weight: Weight, e: int, dtype: torch.dtype) -> Weight:
    """Expert `e` of a weight [E, out, in] as a dense one [out, in] in `dtype`; `dense` is the column's."""
    if not weight.packed:
        return Weight(weight.values[e])
    _, out_features, in_features = weight.shape
    n = out_features * in_features
    part, first = holding(weight, e * n, (e + 1) * n)
    return Weight(dense(part, dtype)[first : first + n].view(out_features, in_features))


def _result(like: Tensor, columns: int, ends: Tensor) -> Tensor:
    """[S, columns] for the rows of all experts, with zeros in the rows of nobody."""
    y = like.new_empty(like.shape[0], columns)
    y[int(ends[-1]) :] = 0
    return y


def _of(values: Tensor | None, e: int) -> Tensor | None:
    return None if values is None else values[e]


def experts_linear(
    dense: Callable, linear: Callable, x: Tensor, ends: Tensor, weight: Weight, bias: Tensor | None
) -> Tensor:
    y = _result(x, weight.shape[1], ends)
    for e, rows in with_rows(ends, len(x)):
        w = dense_expert(dense, weight, e, x.dtype).values
        y[rows] = linear(x[rows], w, None if bias is None else bias[e].to(x.dtype))
    return y


def experts_linear_backward(dense: Callable, linear: Callable, dy: Tensor, ends: Tensor, weight: Weight) -> Tensor:
    dx = _result(dy, weight.shape[2], ends)
    for e, rows in with_rows(ends, len(dy)):
        dx[rows] = linear(dy[rows], dense_expert(dense, weight, e, dy.dtype).values.t())
    return dx


def experts_lora(
    dense: Callable,
    lora_linear: Callable,
    x: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, xa = _result(x, weight.shape[1], ends), _result(x, lora_A.shape[1], ends)
    for e, rows in with_rows(ends, len(x)):
        w = dense_expert(dense, weight, e, x.dtype)
        rest = (_of(bias, e), scaling, dropout, seed_of(seed, e))
        y[rows], xa[rows] = lora_linear(x[rows], w, lora_A[e], lora_B[e], *rest)
    return y, xa


def experts_lora_backward(
    dense: Callable,
    lora_linear_backward: Callable,
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _result(x, x.shape[1], ends) if needs_dx else x.new_empty(0)
    dA, dB = lora_A.new_zeros(lora_A.shape), lora_B.new_zeros(lora_B.shape)
    for e, rows in with_rows(ends, len(x)):
        w = dense_expert(dense, weight, e, x.dtype) if needs_dx else None
        given = (dy[rows], x[rows], xa[rows], w, lora_A[e], lora_B[e], scaling, dropout, seed_of(seed, e), needs_dx)
        one, dA[e], dB[e] = lora_linear_backward(*given)
        if needs_dx:
            dx[rows] = one
    return dx, dA, dB


def experts_norm(
    dense: Callable,
    dora_norm: Callable,
    weight: Weight,
    norm_sq: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    norm = torch.empty_like(norm_sq)
    for e in range(weight.shape[0]):
        w = dense_expert(dense, weight, e, weight.dtype)
        norm[e] = dora_norm(w, norm_sq[e], lora_A[e], lora_B[e], scaling)
    return norm


def experts_dora(
    dense: Callable,
    dora_linear: Callable,
    x: Tensor,
    ends: Tensor,
    weight: Weight,
    norm_sq: Tensor,
    norm: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, xa = _result(x, weight.shape[1], ends), _result(x, lora_A.shape[1], ends)
    norms, gains = torch.zeros_like(norm_sq), torch.zeros_like(norm_sq)
    keeps_z = dropout > 0 or bias is not None
    z = _result(x, weight.shape[1], ends) if keeps_z else x.new_empty(0)
    for e, rows in with_rows(ends, len(x)):
        w = dense_expert(dense, weight, e, x.dtype)
        adapter = (lora_A[e], lora_B[e], magnitude[e], _of(bias, e), scaling, dropout, seed_of(seed, e))
        y[rows], xa[rows], norms[e], gains[e], one = dora_linear(x[rows], w, norm_sq[e], _of(norm, e), *adapter)
        if keeps_z:
            z[rows] = one
    return y, xa, norms, gains, z


def experts_dora_backward(
    dense: Callable,
    dora_linear_backward: Callable,
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    z: Tensor,
    norm: Tensor,
    gain: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = _result(x, x.shape[1], ends) if needs_dx else x.new_empty(0)
    dA, dB, dm = (t.new_zeros(t.shape) for t in (lora_A, lora_B, magnitude))
    for e, rows in with_rows(ends, len(x)):
        w = dense_expert(dense, weight, e, x.dtype)
        kept = (None, z[rows]) if y is None else (y[rows], z)
        adapter = (lora_A[e], lora_B[e], magnitude[e], scaling, dropout, seed_of(seed, e), needs_dx)
        given = (dy[rows], x[rows], xa[rows], *kept, norm[e], gain[e], w, *adapter)
        one, dA[e], dB[e], dm[e] = dora_linear_backward(*given)
        if needs_dx:
            dx[rows] = one
    return dx, dA, dB, dm
