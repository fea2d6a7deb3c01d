"""Softmax attention of many queries, forward and backward.

    P = softmax(scale · QKᵀ + mask),  O = P V
    dV = Pᵀ dO,  dS = scale · P ⊙ (dO Vᵀ − Σ_d dO ⊙ O),  dQ = dS K,  dK = dSᵀ Q

As in torch's kernels (Dao 2023, FlashAttention-2, §3.1), scores, P and dO Vᵀ are fp32, the other products run in the
compute dtype, and backward computes P again. Queries that share keys and values (GQA) are rows of the same product.
Kept from forward to backward: Q, K, V, O and the mask. Not materialised: repeated keys and values.

The ops have the heads of a group as rows: Q [batch · groups, heads of a group, queries, d], K and V [batch · groups,
keys, d]. O is [batch, queries, groups, heads of a group, d]: the model's next linear reads and keeps it so.
"""

from torch import Tensor

from kernels.op import define_op


@define_op
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, batch: int) -> Tensor:
    groups, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, groups // batch, heads, v.shape[-1])


@define_op
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV)"""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(inputs, out: Tensor) -> dict:
    kept = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "mask": inputs.mask, "out": out}
    return kept | {"scale": inputs.scale}


def _backward(kept, needs, dout: Tensor) -> dict:
    dq, dk, dv = _attention_backward(dout, kept.q, kept.k, kept.v, kept.mask, kept.out, kept.scale)
    return {"q": dq if needs.q else None, "k": dk if needs.k else None, "v": dv if needs.v else None}


_attention.differentiate(_keep, _backward)


def rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Queries of x [groups, heads, queries, d] as rows of one matrix a group: [groups, heads · (stop - start), d]."""
    return x[:, :, start:stop].flatten(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention.

    Args:
        q: [batch, heads, queries, d]. k, v: [batch, groups, keys, d], groups dividing heads.
        mask: bool [batch, 1, queries, keys], True where a query sees a key, or floats to add to the scores; None: a
            query sees the keys up to its own place. A query that sees nothing attends to every key alike.
        scale: of the scores.

    Returns:
        [batch, heads, queries, d of v], in memory [batch, queries, heads, d]. Differentiable in q, k and v.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4 and q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise ValueError(f"{shapes} must be floats of one dtype with four dimensions")
    (batch, heads, queries, d), (_, groups, keys, _) = q.shape, k.shape
    if k.shape != (batch, groups, keys, d) or v.shape[:3] != k.shape[:3] or groups == 0 or heads % groups:
        raise ValueError(f"{shapes} do not fit: [batch, heads, queries, d] and [batch, groups, keys, d]")
    if mask is None and queries > keys:
        raise ValueError(f"{queries} queries see up to their own place, but there are {keys} keys: give a mask")
    if mask is not None and mask.shape != (batch, 1, queries, keys):
        raise ValueError(f"mask {tuple(mask.shape)} must be {(batch, 1, queries, keys)}")
    out = _attention(q.reshape(batch * groups, -1, *q.shape[2:]), k.flatten(0, 1), v.flatten(0, 1), mask, scale, batch)
    return out.flatten(2, 3).transpose(1, 2)
