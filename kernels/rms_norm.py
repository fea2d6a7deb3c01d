"""RMSNorm, forward and backward; alone, or of a sum that it also returns.

    r = 1 / √(mean x² + ε)                                  [..., 1], fp32 (fp64 for fp64)
    y = w ⊙ x r                                             [..., n]

    dx = r · (w ⊙ dy) − x r³ · mean(w ⊙ dy ⊙ x),   dw = Σ dy ⊙ x r

    add_rms_norm:  h = x + residual,  y = norm(h)           dx = dresidual = dx of the norm at h + dh

h is a result, and is written once; the gradient of x has its two terms added before it is rounded.

x r is rounded to x's dtype before it is multiplied with w, as transformers' norms do. Zhang and Sennrich 2019, §4. Kept
from forward to backward: x as it came, and r. Eager PyTorch keeps x in fp32.
"""

import torch
from torch import Tensor

from kernels.op import define_op


@define_op
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y [..., n], r [..., 1]) of a contiguous x."""
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))


@define_op
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool) -> tuple[Tensor, Tensor]:
    """(dx, dw or no element); dy is contiguous."""
    return torch.empty_like(x), weight.new_empty(weight.shape if needs_dweight else 0)


def _keep(inputs, results) -> dict:
    return {"x": inputs.x, "weight": inputs.weight, "r": results[1]}


def _backward(kept, needs, dy: Tensor, _) -> dict:
    dx, dweight = _rms_norm_backward(dy.contiguous(), kept.x, kept.weight, kept.r, needs.weight)
    return {"x": dx if needs.x else None, "weight": dweight if needs.weight else None}


_rms_norm.differentiate(_keep, _backward)


@define_op
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., n], h = x + residual [..., n], r [..., 1]) of contiguous x and residual."""
    y, r = _rms_norm.fake(x, weight, eps)
    return y, torch.empty_like(x), r


@define_op
def _add_rms_norm_backward(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, r: Tensor, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """(the gradient of x and of residual, dw or no element); dy and dh are contiguous."""
    return torch.empty_like(h), weight.new_empty(weight.shape if needs_dweight else 0)


def _keep_sum(inputs, results) -> dict:
    return {"h": results[1], "weight": inputs.weight, "r": results[2]}


def _backward_of_sum(kept, needs, dy: Tensor | None, dh: Tensor | None, _) -> dict:
    if dy is None:
        return {"x": dh, "residual": dh}
    if dh is None:
        dx, dweight = _rms_norm_backward(dy.contiguous(), kept.h, kept.weight, kept.r, needs.weight)
    else:
        given = (dy.contiguous(), dh.contiguous(), kept.h, kept.weight, kept.r, needs.weight)
        dx, dweight = _add_rms_norm_backward(*given)
    return {"x": dx, "residual": dx, "weight": dweight if needs.weight else None}


_add_rms_norm.differentiate(_keep_sum, _backward_of_sum, results=2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: [..., n]. weight: [n], of any float dtype.

    Returns:
        [..., n] in the wider of both dtypes. Differentiable in x and weight.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, weight)
    return _rms_norm(x.contiguous(), weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of a sum over the last dimension, and the sum, as the blocks of a decoder need both.

    Args:
        x, residual: [..., n] of one dtype. weight: [n], of any float dtype.

    Returns:
        (norm(x + residual) in the wider of both dtypes, x + residual). Differentiable in x, residual and weight.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} does not fit x {tuple(x.shape)} {x.dtype}: "
            "they must be alike"
        )
    y, h, _ = _add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
    return y, h


def _check(x: Tensor, weight: Tensor) -> None:
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: both must be floats")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}: it must be [n], x [..., n]")
