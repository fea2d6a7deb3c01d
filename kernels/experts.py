"""The linears of all experts of a mixture, frozen, alone or with LoRA or DoRA adapters, forward and backward.

Rows of x are sorted by expert (`kernels.route`): expert e has rows ends[e-1] … ends[e]-1, as `offs` of torch's
grouped_mm has them. With W_e [out, in], A_e [r, in], B_e [out, r], for a row t of expert e:

    y_t = W_e x_t + bias_e                                                           experts_linear
    y_t = W_e x_t + s·B_e A_e drop(x_t) + bias_e                                     experts_lora
    y_t = g_e ⊙ (W_e x_t + s·B_e A_e x_t) + bias_e,  g_e = m_e / ‖W_e + sB_e A_e‖    experts_dora

So each expert is the linear of lora.py or dora.py of its rows, with the gradients of it; its dropout has the seed
`seed_of(seed, e)`. Rows from ends[-1] on belong to nobody: their y and dx are 0, and they add nothing to a gradient. An
expert without rows has gradients of 0, and experts_dora leaves its norm out.

W [E, out, in] may be packed as one tensor: blocks are `blocksize` consecutive values of all of it. Kept from forward to
backward: x, xa, and DoRA's y or z. Not materialised: BA; beyond one call: a dense W. The bias is frozen.
"""

import torch
from torch import Tensor

from kernels.dropout import new_seed
from kernels.op import define_op
from kernels.weight import FLOATS, QuantState, Weight, as_weight


@define_op(products=True)
def _experts_linear(x: Tensor, ends: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@define_op(products=True)
def _experts_linear_backward(dy: Tensor, ends: Tensor, weight: Weight) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[2])


def _linear_backward(kept, needs, dy: Tensor) -> dict:
    return {"x": _experts_linear_backward(dy.contiguous(), kept.ends, kept.weight) if needs.x else None}


_experts_linear.differentiate(lambda inputs, _: {"ends": inputs.ends, "weight": inputs.weight}, _linear_backward)


@define_op(products=True)
def _experts_lora(
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
    """(y [S, out], xa [S, r] in x's dtype)"""
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_A.shape[1])


@define_op(products=True)
def _experts_lora_backward(
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
    """(dx [S, in], or no element where nobody needs it; dA; dB); dy is contiguous."""
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _keep_lora(inputs, results) -> dict:
    return {
        **{"x": inputs.x, "xa": results[1], "ends": inputs.ends, "weight": inputs.weight},
        **{"lora_A": inputs.lora_A, "lora_B": inputs.lora_B},
        **{"scaling": inputs.scaling, "dropout": inputs.dropout, "seed": inputs.seed},
    }


def _lora_backward(kept, needs, dy: Tensor, _dxa) -> dict:
    dx, dA, dB = _experts_lora_backward(
        *(dy.contiguous(), kept.x, kept.xa, kept.ends, kept.weight, kept.lora_A, kept.lora_B),
        *(kept.scaling, kept.dropout, kept.seed, needs.x),
    )
    return {"x": dx if needs.x else None, "lora_A": dA, "lora_B": dB}


_experts_lora.differentiate(_keep_lora, _lora_backward)


@define_op(products=True)
def _experts_dora(
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
    """(y [S, out], xa [S, r], norm and gain fp32 [E, out], z [S, out] or empty where y holds it). Nobody reads the norm
    and the gain of an expert without rows."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    z = torch.empty_like(y) if dropout or bias is not None else x.new_empty(0)
    xa = x.new_empty(x.shape[0], lora_A.shape[1])
    return y, xa, norm_sq.new_empty(norm_sq.shape), norm_sq.new_empty(norm_sq.shape), z


@define_op(products=True)
def _experts_dora_backward(
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
    """(dx [S, in] or no element, dA, dB, dm); y is None where z is kept; dy is contiguous."""
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    dA, dB = lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)
    return dx, dA, dB, magnitude.new_empty(magnitude.shape)


def _keep_dora(inputs, results) -> dict:
    y, xa, norm, gain, z = results
    kept = {
        **{"x": inputs.x, "xa": xa, "z": z, "norm": norm, "gain": gain, "ends": inputs.ends, "weight": inputs.weight},
        **{"lora_A": inputs.lora_A, "lora_B": inputs.lora_B, "magnitude": inputs.magnitude},
        **{"scaling": inputs.scaling, "dropout": inputs.dropout, "seed": inputs.seed},
    }
    return kept | {"y": None if inputs.dropout or inputs.bias is not None else y}


def _dora_backward(kept, needs, dy: Tensor, *_) -> dict:
    dx, dA, dB, dm = _experts_dora_backward(
        *(dy.contiguous(), kept.x, kept.xa, kept.y, kept.z, kept.norm, kept.gain, kept.ends, kept.weight),
        *(kept.lora_A, kept.lora_B, kept.magnitude, kept.scaling, kept.dropout, kept.seed, needs.x),
    )
    return {"x": dx if needs.x else None, "lora_A": dA, "lora_B": dB, "magnitude": dm}


_experts_dora.differentiate(_keep_dora, _dora_backward)


@define_op(products=True)
def _experts_norm(weight: Weight, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return torch.empty_like(norm_sq)


def experts_linear(
    x: Tensor, ends: Tensor, weight: Tensor | Weight, bias: Tensor | None = None, quant_state: QuantState | None = None
) -> Tensor:
    """The frozen linears of all experts.

    Args:
        x: [S, in], fp32, fp16 or bf16, the compute dtype; rows sorted by expert, as `route` orders them.
        ends: int32 [E]: expert e has rows ends[e-1] … ends[e]-1.
        weight: [E, out, in] in x's dtype, or packed codes with their `quant_state`; or a Weight, which has both.
        bias: [E, out] or None. Frozen, as the weight is.

    Returns:
        [S, out] in x's dtype, 0 in rows from ends[-1] on. Differentiable in x.

    Raises:
        ValueError: shapes or dtypes that do not fit, a bias that wants a gradient.
    """
    weight = as_weight(weight, quant_state)
    _check(x, ends, weight, bias)
    return _experts_linear(x, ends.contiguous(), weight, bias)


def experts_lora(
    x: Tensor,
    ends: Tensor,
    weight: Tensor | Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    quant_state: QuantState | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The frozen linears of all experts, each with a LoRA adapter.

    Args:
        x, ends, weight, bias, quant_state: as in `experts_linear`.
        lora_A: [E, rank, in], lora_B: [E, out, rank], fp32 in training; cast to x's dtype for the products.
        scaling: α / rank, or α / √rank (rsLoRA).
        dropout: probability with which an element of an adapter's input is dropped.
        seed: int64 [], decides the masks; by default drawn from torch's generator.

    Returns:
        [S, out] in x's dtype. Differentiable in x, lora_A and lora_B.

    Raises:
        ValueError: shapes or dtypes that do not fit, a bias that wants a gradient.
    """
    weight = as_weight(weight, quant_state)
    _check(x, ends, weight, bias)
    _check_adapters(weight, lora_A, lora_B, dropout)
    if dropout and seed is None:
        seed = new_seed(x.device)
    return _experts_lora(x, ends.contiguous(), weight, lora_A, lora_B, bias, scaling, dropout, seed)[0]


def experts_dora(
    x: Tensor,
    ends: Tensor,
    weight: Tensor | Weight,
    norm_sq: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    quant_state: QuantState | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """The frozen linears of all experts, each with a DoRA adapter.

    Args:
        x, ends, weight, bias, quant_state: as in `experts_linear`.
        norm_sq: fp32 [E, out]: `weight_norm_sq(weight.rows()).view(E, out)` of a Weight.
        lora_A, lora_B, scaling, dropout, seed: as in `experts_lora`.
        magnitude: [E, out], fp32 in training.
        norm: fp32 [E, out], as `experts_norm` returned it. Computed, for the experts that have rows, if not given.

    Returns:
        [S, out] in x's dtype. Differentiable in x, lora_A, lora_B and magnitude; the norm is a constant in backward.

    Raises:
        ValueError: shapes or dtypes that do not fit, a bias that wants a gradient.
    """
    weight = as_weight(weight, quant_state)
    _check(x, ends, weight, bias)
    _check_adapters(weight, lora_A, lora_B, dropout, magnitude=magnitude, norm_sq=norm_sq, norm=norm)
    if dropout and seed is None:
        seed = new_seed(x.device)
    given = (norm_sq, norm, lora_A, lora_B, magnitude, bias, scaling, dropout, seed)
    return _experts_dora(x, ends.contiguous(), weight, *given)[0]


def experts_norm(
    weight: Tensor | Weight,
    norm_sq: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    quant_state: QuantState | None = None,
) -> Tensor:
    """‖W_e + scaling·B_e A_e‖ of each row of each expert, fp32 [E, out]. Not differentiable.

    Args:
        weight, norm_sq, lora_A, lora_B, scaling, quant_state: as in `experts_dora`.

    Raises:
        ValueError: shapes that do not fit.
    """
    weight = as_weight(weight, quant_state)
    _check_experts(weight)
    _check_adapters(weight, lora_A, lora_B, norm_sq=norm_sq)
    return _experts_norm(weight, norm_sq, lora_A.detach(), lora_B.detach(), scaling)


def _check_experts(weight: Weight) -> None:
    if len(weight.shape) != 3:
        raise ValueError(f"the weight of experts {tuple(weight.shape)} must be [experts, out, in]")


def _check(x: Tensor, ends: Tensor, weight: Weight, bias: Tensor | None) -> None:
    _check_experts(weight)
    experts, out_features, in_features = weight.shape
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; it must be float32, float16 or bfloat16")
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"x {tuple(x.shape)} must be [rows, in] of experts of shape {tuple(weight.shape)}")
    if not weight.packed and weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} but the weight is {weight.dtype}")
    if ends.shape != (experts,) or ends.dtype != torch.int32:
        raise ValueError(f"ends {tuple(ends.shape)} of {ends.dtype} must be [{experts}] of int32: one for each expert")
    if bias is not None and bias.shape != (experts, out_features):
        raise ValueError(f"bias {tuple(bias.shape)} must be [{experts}, {out_features}]")
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("experts give no gradient for their bias: freeze it with requires_grad_(False)")


def _check_adapters(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, dropout: float = 0.0, **of_rows: Tensor | None
) -> None:
    experts, out_features, in_features = weight.shape
    rank = lora_A.shape[1] if lora_A.dim() == 3 else 0
    if rank == 0 or lora_A.shape != (experts, rank, in_features) or lora_B.shape != (experts, out_features, rank):
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit {experts} experts of shape "
            f"{(out_features, in_features)}: they must be [experts, rank, in] and [experts, out, rank] with rank ≥ 1"
        )
    for name, values in of_rows.items():
        if values is not None and values.shape != (experts, out_features):
            raise ValueError(f"{name} {tuple(values.shape)} must be [{experts}, {out_features}]")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")
