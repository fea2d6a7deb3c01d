"""DoRA over a dense or packed weight, forward and backward, and its norm.

    ‖W + sBA‖_i = √Σ_k (W_ik + s·(BA)_ik)²                                  [out], fp32
    g = m / ‖W + sBA‖                                                       [out], fp32, 0 where the norm is 0
    y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + bias                                         without dropout
    y = (x - drop(x))Wᵀ + g ⊙ (drop(x)Wᵀ + s(drop(x)Aᵀ)Bᵀ) + bias           with dropout: PEFT's form

Backward treats the norm as a constant (DoRA, Liu et al. 2024, §4.3):

    dX, dA, dB = LoRA's backward of g ⊙ dY
    dm = Σ_t dY ⊙ z / ‖W + sBA‖,   z = drop(x)(W + sBA)ᵀ

Backward keeps x and xAᵀ. It also keeps y: z / ‖·‖ = y / m. Where m = 0 it computes z again. With dropout or a bias it
keeps z and not y: z cannot be recovered from y without loss.

In torch the norm is computed in factored form, from ‖W‖², which is computed once, and thin products:

    ‖W + sBA‖² = ‖W‖² + 2s·Σ_j B_ij (WAᵀ)_ij + s²·(B(AAᵀ)Bᵀ)_ii              row i

The Triton kernel adds sBA to W in registers and then squares. It needs neither ‖W‖² nor the thin products.
"""

import torch
from torch import Tensor

from kernels.dropout import new_seed
from kernels.op import define_op
from kernels.weight import QuantState, Weight, as_weight, check_adapter, check_input


@define_op(products=True)
def _dora_linear(
    x: Tensor,
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
    """(y [T, out], xa [T, r], norm and gain fp32 [out], z [T, out] = drop(x)(W + sBA)ᵀ or empty where y holds it)"""
    y = x.new_empty(x.shape[0], lora_B.shape[0])
    z = torch.empty_like(y) if dropout or bias is not None else x.new_empty(0)
    xa = x.new_empty(x.shape[0], lora_A.shape[0])
    return y, xa, norm_sq.new_empty(norm_sq.shape), norm_sq.new_empty(norm_sq.shape), z


@define_op(products=True)
def _dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    z: Tensor,
    norm: Tensor,
    gain: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [T, in] or no element, dA, dB, dm); y is None where z is kept; dy is contiguous."""
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    dA, dB = lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)
    return dx, dA, dB, magnitude.new_empty(magnitude.shape)


def over_norm(x: Tensor, norm: Tensor) -> Tensor:
    """x / ‖W + sBA‖, fp32 [out]; 0 for a row of zeros, which has no direction to scale."""
    return (x / norm).masked_fill_(norm == 0, 0.0)


def _keep(inputs, results) -> dict:
    y, xa, norm, gain, z = results
    bias = inputs.bias
    kept = {
        **{"x": inputs.x, "xa": xa, "z": z, "norm": norm, "gain": gain, "weight": inputs.weight},
        **{"lora_A": inputs.lora_A, "lora_B": inputs.lora_B, "magnitude": inputs.magnitude},
        **{"scaling": inputs.scaling, "dropout": inputs.dropout, "seed": inputs.seed},
        "bias_dtype": None if bias is None else bias.dtype,
    }
    return kept | {"y": None if inputs.dropout or bias is not None else y}


def _backward(kept, needs, dy: Tensor, *_) -> dict:
    dx, dA, dB, dm = _dora_linear_backward(
        *(dy.contiguous(), kept.x, kept.xa, kept.y, kept.z, kept.norm, kept.gain, kept.weight),
        *(kept.lora_A, kept.lora_B, kept.magnitude, kept.scaling, kept.dropout, kept.seed, needs.x),
    )
    return {
        **{"x": dx if needs.x else None, "lora_A": dA, "lora_B": dB, "magnitude": dm},
        "bias": dy.sum(0).to(kept.bias_dtype) if needs.bias else None,
    }


_dora_linear.differentiate(_keep, _backward)


@define_op
def _weight_norm_sq(weight: Weight) -> Tensor:
    return weight.values.new_empty(weight.shape[0], dtype=torch.float32)


@define_op(products=True)
def _dora_norm(weight: Weight, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return torch.empty_like(norm_sq)


def dora_linear(
    x: Tensor,
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
    """A frozen linear with a DoRA adapter.

    Args:
        x: [..., in], fp32, fp16 or bf16: the compute dtype.
        weight: [out, in] in x's dtype, or packed codes with their `quant_state`; or a Weight, which has both. Frozen.
        norm_sq: fp32 [out], as `weight_norm_sq` returns it for this weight.
        lora_A: [rank, in], lora_B: [out, rank], magnitude: [out], fp32 in training (a bf16 magnitude stops learning:
            its updates round to zero).
        scaling: α / rank, or α / √rank (rsLoRA).
        bias: [out] or None.
        dropout: probability with which an element of the adapter's input is dropped.
        seed: int64 [], decides the mask; by default drawn from torch's generator.
        norm: fp32 [out], as `dora_norm` returned it for this weight, lora_A, lora_B and scaling. Computed if not given.

    Returns:
        [..., out] in x's dtype. Differentiable in x, lora_A, lora_B, magnitude and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    weight = as_weight(weight, quant_state)
    check_input(x, weight)
    out_features = weight.shape[0]
    check_adapter(x, lora_A, lora_B, out_features, bias, dropout)
    for name, vector in {"magnitude": magnitude, "norm_sq": norm_sq, "norm": norm}.items():
        if vector is not None and vector.shape != (out_features,):
            raise ValueError(f"{name} {tuple(vector.shape)} must be [{out_features}]")
    if dropout and seed is None:
        seed = new_seed(x.device)
    rows = x.reshape(-1, x.shape[-1])
    y, *_ = _dora_linear(rows, weight, norm_sq, norm, lora_A, lora_B, magnitude, bias, scaling, dropout, seed)
    return y.view(*x.shape[:-1], out_features)


def weight_norm_sq(weight: Tensor | Weight, quant_state: QuantState | None = None) -> Tensor:
    """‖W‖² of each row, fp32 [out], of a dense weight [out, in], of codes with their quant_state, or of a Weight.

    Raises:
        ValueError: a weight that is not [out, in], or whose codes and quant_state do not fit.
    """
    weight = as_weight(weight, quant_state)
    check_input(weight.values.new_empty(0, weight.shape[-1], dtype=weight.dtype), weight)
    return _weight_norm_sq(weight)


def dora_norm(
    weight: Tensor | Weight,
    norm_sq: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    quant_state: QuantState | None = None,
) -> Tensor:
    """‖W + scaling·BA‖ of each row, fp32 [out]. Not differentiable.

    Args:
        weight: [out, in], or packed codes with their `quant_state`; or a Weight, which has both.
        norm_sq: fp32 [out], as `weight_norm_sq` returns it for this weight.
        lora_A: [rank, in], lora_B: [out, rank].
        scaling: α / rank, or α / √rank.

    Raises:
        ValueError: shapes that do not fit.
    """
    weight = as_weight(weight, quant_state)
    x = lora_A.new_empty(0, lora_A.shape[-1], dtype=weight.dtype)
    check_input(x, weight)
    check_adapter(x, lora_A, lora_B, weight.shape[0])
    if norm_sq.shape != (weight.shape[0],):
        raise ValueError(f"norm_sq {tuple(norm_sq.shape)} must be [{weight.shape[0]}]")
    return _dora_norm(weight, norm_sq, lora_A.detach(), lora_B.detach(), scaling)
