"""y = xWᵀ + bias over a packed NF4 weight: the frozen linear of QLoRA without an adapter.

W is dequantized in forward, unless there are so few tokens that nf4_gemm.py reads the codes directly, and again in
backward (dX = dY W), and the products are the library's; no W-sized tensor is kept in between.
"""

from torch import Tensor

from kernels import nf4_gemm, reference
from kernels.base_weight import base_args, check_bias, dense_weight
from kernels.dispatch import use_triton
from kernels.gemm import gemm
from kernels.library import define_op, register_autograd, register_fake
from kernels.quant_state import QuantState


@define_op("nf4_linear")
def _nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    base = (packed, absmax, nested_absmax, nested_offset, blocksize, quant_type)
    if use_triton(x, products=True) and nf4_gemm.takes(x, base):
        x = x.contiguous()
        return gemm(x, None, bias=bias, xw=nf4_gemm.nf4_gemm(x, base, out_features))[0]
    return reference.linear(x, dense_weight(base, (out_features, x.shape[1]), x.dtype), bias)


@register_fake("nf4_linear")
def _(x, packed, absmax, nested_absmax, nested_offset, blocksize, quant_type, out_features, bias):
    return x.new_empty(x.shape[0], out_features)


@define_op("nf4_linear_backward")
def _nf4_linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    in_features: int,
) -> Tensor:
    base = (packed, absmax, nested_absmax, nested_offset, blocksize, quant_type)
    return dy @ dense_weight(base, (dy.shape[1], in_features), dy.dtype)


@register_fake("nf4_linear_backward")
def _(dy, packed, absmax, nested_absmax, nested_offset, blocksize, quant_type, in_features):
    return dy.new_empty(dy.shape[0], in_features)


def _setup_context(ctx, inputs, output):
    x, *base, blocksize, quant_type, _, bias = inputs
    ctx.save_for_backward(*base)
    ctx.blocksize, ctx.quant_type, ctx.in_features = blocksize, quant_type, x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        base = (*ctx.saved_tensors, ctx.blocksize, ctx.quant_type)
        dx = _nf4_linear_backward(dy.contiguous(), *base, ctx.in_features)
    if ctx.needs_input_grad[8]:
        dbias = dy.sum(0).to(ctx.bias_dtype)
    return dx, None, None, None, None, None, None, None, dbias


register_autograd("nf4_linear", _backward, _setup_context)


def nf4_linear(x: Tensor, packed: Tensor, quant_state: QuantState, bias: Tensor | None = None) -> Tensor:
    """x @ dequantize_4bit(packed, quant_state).T + bias.

    Args:
        x: [..., in], fp32, fp16 or bf16: the compute dtype.
        packed: uint8 NF4 codes of a weight [out, in], with its quant_state.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype. Differentiable in x and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    base = base_args(packed, quant_state, x)
    out_features = quant_state.shape[0]
    check_bias(bias, out_features)
    y = _nf4_linear(x.reshape(-1, x.shape[-1]), *base, out_features, bias)
    return y.view(*x.shape[:-1], out_features)
