"""LoRA over a dense or NF4 base weight, forward and backward.

    xa = s·drop(x)Aᵀ                 [T, r]
    y  = xWᵀ + xa Bᵀ + bias          [T, out]

    dxa = s·dY B                     [T, r]
    dX  = dY W + mask ⊙ (dxa A),  dA = dxaᵀ drop(x),  dB = dYᵀ xa

LoRA, Hu et al. 2021, §4.1. Kept from forward to backward: x and xa. Not materialised: BA; beyond one call: a dense W
(an NF4 W is dequantized once in forward and once in backward) and the dropout mask (made again from its seed).

Launches over an NF4 weight: forward 3 (dequantize, xa, the product with everything else in its epilogue), y written
once; backward 4 (dequantize, dxa, dA with dB, dX), dX written once. Few tokens skip the dequantization: forward is xa,
one pass over the packed weight, and the sum of its splits with everything else. See low_rank.py, gemm.py, nf4_gemm.py.

Backward reads dY three times, for dxa, dB and dX. One pass for the first two would keep the sums of one of them on chip
and write those of the other as fp32 partial sums, once for each tile of tokens: 8·r / BLOCK_M bytes an element of dY to
write and read, against the 2 bytes of bf16 that it saves. At 128 tokens a tile that is 4 bytes at rank 64, 1 byte at
rank 16, where at most one byte in six would be won and 4096 tokens would keep only 32 of a GPU's multiprocessors busy.
"""

from torch import Tensor

from kernels import nf4_gemm, reference
from kernels.base_weight import base_args, check_adapter, dense_weight
from kernels.dispatch import use_triton
from kernels.dropout import new_seed
from kernels.gemm import gemm
from kernels.library import define_op, register_autograd, register_fake
from kernels.low_rank import outer, project
from kernels.quant_state import QuantState


@define_op("lora_linear")
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    base = (weight, absmax, nested_absmax, nested_offset, blocksize, quant_type)
    shape = (lora_B.shape[0], lora_A.shape[1])
    if not use_triton(x, products=True):
        w = dense_weight(base, shape, x.dtype)
        return reference.lora_linear(x, w, lora_A, lora_B, bias, scaling, dropout, seed)
    x = x.contiguous()
    xa = project(x, lora_A.t(), scaling, dropout, seed)
    if nf4_gemm.takes(x, base):
        y, _ = gemm(x, None, xa, lora_B.t(), bias, xw=nf4_gemm.nf4_gemm(x, base, shape[0]))
    else:
        y, _ = gemm(x, dense_weight(base, shape, x.dtype).t(), xa, lora_B.t(), bias)
    return y, xa


@register_fake("lora_linear")
def _(x, weight, absmax, nested_absmax, nested_offset, blocksize, quant_type, lora_A, lora_B, *rest):
    return x.new_empty(x.shape[0], lora_B.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@define_op("lora_linear_backward")
def _lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    base = (weight, absmax, nested_absmax, nested_offset, blocksize, quant_type)
    w = dense_weight(base, (lora_B.shape[0], lora_A.shape[1]), x.dtype) if needs_dx else None
    if not use_triton(x, products=True):
        return reference.lora_linear_backward(dy, x, xa, w, lora_A, lora_B, scaling, dropout, seed)
    return lora_linear_backward_kernels(dy, x.contiguous(), xa, w, lora_A, lora_B, scaling, dropout, seed)


def lora_linear_backward_kernels(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    w: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.lora_linear_backward` by the kernels; dy and x are contiguous."""
    dxa = project(dy, lora_B, scaling)
    dA, dB = outer(x, dxa, dy, xa, (lora_A.dtype, lora_B.dtype), p, seed)
    dx = x.new_empty(0) if w is None else gemm(dy, w, dxa, lora_A, p=p, seed=seed)[0]
    return dx, dA, dB


@register_fake("lora_linear_backward")
def _(dy, x, xa, weight, absmax, nested_absmax, nested_offset, blocksize, quant_type, lora_A, lora_B, *rest):
    dx = x.new_empty(x.shape) if rest[-1] else x.new_empty(0)
    return dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _setup_context(ctx, inputs, output):
    x, *base, blocksize, quant_type, lora_A, lora_B, bias, scaling, dropout, seed = inputs
    xa = output[1]
    ctx.save_for_backward(x, xa, *base, lora_A, lora_B, seed)
    ctx.blocksize, ctx.quant_type, ctx.scaling, ctx.dropout = blocksize, quant_type, scaling, dropout
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # or zeros are made for the outputs that have no gradient
    ctx.mark_non_differentiable(xa)


def _backward(ctx, dy, _dxa):
    x, xa, *base, lora_A, lora_B, seed = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        raise RuntimeError("lora_linear gives no gradient for the base weight: it is frozen")
    dx, dA, dB = _lora_linear_backward(
        dy.contiguous(),
        x,
        xa,
        *base,
        ctx.blocksize,
        ctx.quant_type,
        lora_A,
        lora_B,
        ctx.scaling,
        ctx.dropout,
        seed,
        ctx.needs_input_grad[0],
    )
    dx = dx if ctx.needs_input_grad[0] else None
    dbias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[9] else None
    return dx, None, None, None, None, None, None, dA, dB, dbias, None, None, None


register_autograd("lora_linear", _backward, _setup_context)


def lora_linear(
    x: Tensor,
    weight: Tensor,
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
        weight: [out, in] in x's dtype, or packed codes with their `quant_state`. Frozen.
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
    base = base_args(weight, quant_state, x)
    out_features = weight.shape[0] if quant_state is None else quant_state.shape[0]
    check_adapter(x, lora_A, lora_B, out_features, bias, dropout)
    if dropout and seed is None:
        seed = new_seed(x.device)
    y, _ = _lora_linear(x.reshape(-1, x.shape[-1]), *base, lora_A, lora_B, bias, scaling, dropout, seed)
    return y.view(*x.shape[:-1], out_features)
