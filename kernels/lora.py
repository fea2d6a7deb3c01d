"""LoRA over a dense or packed weight, forward and backward.

    xa = s·drop(x)Aᵀ                 [T, r]
    y  = xWᵀ + xa Bᵀ + bias          [T, out]

    dxa = s·dY B                     [T, r]
    dX  = dY W + mask ⊙ (dxa A),  dA = dxaᵀ drop(x),  dB = dYᵀ xa

LoRA, Hu et al. 2021, §4.1. Kept from forward to backward: x and xa. Not materialised: BA; beyond one call: a dense W
(a packed W is dequantized once in forward and once in backward) and the dropout mask (made again from its seed).
"""

from torch import Tensor

from kernels.dropout import new_seed
from kernels.op import define_op
from kernels.weight import QuantState, Weight, as_weight, check_adapter, check_input


@define_op(products=True)
def _lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [T, out], xa [T, r] in x's dtype) of x [T, in]."""
    return x.new_empty(x.shape[0], lora_B.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@define_op(products=True)
def _lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, in], or no element where nobody needs it; dA; dB); dy is contiguous."""
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _keep(inputs, results) -> dict:
    bias = inputs.bias
    return {
        **{"x": inputs.x, "xa": results[1], "weight": inputs.weight, "lora_A": inputs.lora_A, "lora_B": inputs.lora_B},
        **{"scaling": inputs.scaling, "dropout": inputs.dropout, "seed": inputs.seed},
        "bias_dtype": None if bias is None else bias.dtype,
    }


def _backward(kept, needs, dy: Tensor, _dxa) -> dict:
    dx, dA, dB = _lora_linear_backward(
        *(dy.contiguous(), kept.x, kept.xa, kept.weight, kept.lora_A, kept.lora_B),
        *(kept.scaling, kept.dropout, kept.seed, needs.x),
    )
    return {
        **{"x": dx if needs.x else None, "lora_A": dA, "lora_B": dB},
        "bias": dy.sum(0).to(kept.bias_dtype) if needs.bias else None,
    }


_lora_linear.differentiate(_keep, _backward)


def lora_linear(
    x: Tensor,
    weight: Tensor | Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    quant_state: QuantState | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A frozen linear with a LoRA adapter.

    Args:
        x: [..., in], fp32, fp16 or bf16: the compute dtype.
        weight: [out, in] in x's dtype, or packed codes with their `quant_state`; or a Weight, which has both. Frozen.
        lora_A: [rank, in], lora_B: [out, rank], of any float dtype (fp32 in training); cast to x's for the products.
        scaling: α / rank, or α / √rank (rsLoRA).
        bias: [out] or None.
        dropout: probability with which an element of the adapter's input is dropped.
        seed: int64 [], decides the mask; by default drawn from torch's generator.

    Returns:
        [..., out] in x's dtype. Differentiable in x, lora_A, lora_B and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    weight = as_weight(weight, quant_state)
    check_input(x, weight)
    out_features = weight.shape[0]
    check_adapter(x, lora_A, lora_B, out_features, bias, dropout)
    if dropout and seed is None:
        seed = new_seed(x.device)
    y, _ = _lora_linear(x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, bias, scaling, dropout, seed)
    return y.view(*x.shape[:-1], out_features)
