"""y = xWᵀ + bias over a packed weight: the frozen linear of QLoRA without an adapter.

W is dequantized in forward and again in backward (dX = dY W), and the products are the library's; no W-sized tensor is
kept in between. Few tokens skip the dequantization on a GPU.
"""

from torch import Tensor

from kernels.op import define_op
from kernels.weight import QuantState, Weight, as_weight, check_bias, check_input


@define_op(products=True)
def _nf4_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@define_op(products=True)
def _nf4_linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _keep(inputs, _result) -> dict:
    return {"weight": inputs.weight, "bias_dtype": None if inputs.bias is None else inputs.bias.dtype}


def _backward(kept, needs, dy: Tensor) -> dict:
    return {
        "x": _nf4_linear_backward(dy.contiguous(), kept.weight) if needs.x else None,
        "bias": dy.sum(0).to(kept.bias_dtype) if needs.bias else None,
    }


_nf4_linear.differentiate(_keep, _backward)


def nf4_linear(
    x: Tensor, packed: Tensor | Weight, quant_state: QuantState | None = None, bias: Tensor | None = None
) -> Tensor:
    """x @ dequantize_4bit(packed, quant_state).T + bias.

    Args:
        x: [..., in], fp32, fp16 or bf16: the compute dtype.
        packed: uint8 codes of a weight [out, in], with its quant_state; or a Weight, which has both.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype. Differentiable in x and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit, a weight that is not packed.
    """
    weight = as_weight(packed, quant_state)
    if not weight.packed:
        raise ValueError("nf4_linear multiplies with a packed weight: give the codes and their quant_state")
    check_input(x, weight)
    out_features = weight.shape[0]
    check_bias(bias, out_features)
    y = _nf4_linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], out_features)
