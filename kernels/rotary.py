"""Rotary position embedding of queries and keys, forward and backward.

    y₁ = x₁ ⊙ cos₁ − x₂ ⊙ sin₁,   y₂ = x₂ ⊙ cos₂ + x₁ ⊙ sin₂             x₁, x₂ the halves of x's last dimension
    dx₁ = dy₁ ⊙ cos₁ + dy₂ ⊙ sin₂,  dx₂ = dy₂ ⊙ cos₂ − dy₁ ⊙ sin₁

RoFormer, Su et al. 2021, §3.4.2, with halves in place of neighbours, as transformers has it. Each result has the memory
layout that its reader wants. y is [batch, heads, tokens, d], for attention. dx is [batch, tokens, heads, d], for the
linears. Not materialised: the turned halves (−x₂, x₁), which transformers writes as a tensor of their own.
"""

from torch import Tensor

from kernels.op import define_op


@define_op
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [batch, heads, tokens, d], cos and sin [batch or 1, 1, tokens, d]; or with tokens before heads."""
    return q.new_empty(q.shape), k.new_empty(k.shape)


@define_op
def _rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return gradient_of(dq, cos), gradient_of(dk, cos)


def gradient_of(dy: Tensor, cos: Tensor) -> Tensor:
    """An empty dx in memory [batch, tokens, heads, d]."""
    if cos.shape[1] != 1:  # tokens come before heads
        return dy.new_empty(dy.shape)
    batch, heads, tokens, d = dy.shape
    return dy.new_empty(batch, tokens, heads, d).transpose(1, 2)


def _keep(inputs, _) -> dict:
    return {"cos": inputs.cos, "sin": inputs.sin, "shapes": (inputs.q.shape, inputs.k.shape)}


def _backward(kept, needs, *dys: Tensor | None) -> dict:
    dq, dk = (kept.cos.new_zeros(shape) if dy is None else dy for dy, shape in zip(dys, kept.shapes))
    dq, dk = _rotary_backward(dq, dk, kept.cos, kept.sin)
    return {"q": dq if needs.q else None, "k": dk if needs.k else None}


_rotary.differentiate(_keep, _backward, results=2)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions.

    Args:
        q, k: [batch, heads, tokens, d] with an even d; [batch, tokens, heads, d] with unsqueeze_dim=2.
        cos, sin: [batch or 1, tokens, d] in their dtype. They get no gradient.
        unsqueeze_dim: where cos and sin have no dimension for the heads.

    Returns:
        As q and k. Differentiable in both.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    for name, x in (("q", q), ("k", k)):
        fits = x.dim() == cos.dim() == 4 and x.shape[-1] == cos.shape[-1] and x.shape[-1] % 2 == 0
        fits = fits and x.is_floating_point() and x.dtype == cos.dtype
        if not fits or any(there not in (1, n) for there, n in zip(cos.shape, x.shape)):
            raise ValueError(f"cos {tuple(cos.shape)} {cos.dtype} does not fit {name} {tuple(x.shape)} {x.dtype}")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"cos {tuple(cos.shape)} {cos.dtype} and sin {tuple(sin.shape)} {sin.dtype} must be alike")
    return _rotary(q, k, cos, sin)
