"""DoRA over a dense or NF4 base weight, forward and backward.

    g = m / ‖W + sBA‖                                                       [out], see row_norm.py
    y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + bias                                         without dropout
    y = (x - drop(x))Wᵀ + g ⊙ (drop(x)Wᵀ + s(drop(x)Aᵀ)Bᵀ) + bias           with dropout: PEFT's form

Backward treats the norm as a constant (DoRA, Liu et al. 2024, §4.3):

    dX, dA, dB = LoRA's backward of g ⊙ dY
    dm = Σ_t dY ⊙ z / ‖W + sBA‖,   z = drop(x)(W + sBA)ᵀ

Kept from forward to backward beside x and xAᵀ: y alone, since z / ‖·‖ = y / m (where m = 0, z is computed again); z in
place of y if there is dropout or a bias, from which z cannot be read back without loss.
"""

import torch
from torch import Tensor

from kernels import nf4_gemm, reference
from kernels.base_weight import base_args, check_adapter, dense_weight
from kernels.dispatch import use_triton
from kernels.dora_backward import dora_linear_backward
from kernels.dropout import launch_dropout, new_seed
from kernels.gemm import gemm
from kernels.library import define_op, register_autograd, register_fake
from kernels.low_rank import project
from kernels.quant_state import QuantState
from kernels.row_norm import launch_norm


@define_op("dora_linear")
def _dora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
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
    base = (weight, absmax, nested_absmax, nested_offset, blocksize, quant_type)
    shape = (lora_B.shape[0], lora_A.shape[1])
    if not use_triton(x, products=True):
        w = dense_weight(base, shape, x.dtype)
        return reference.dora_linear(x, w, norm_sq, norm, lora_A, lora_B, magnitude, bias, scaling, dropout, seed)
    x = x.contiguous()
    if norm is None:
        norm, gain = launch_norm(base, shape, x.dtype, lora_A, lora_B, scaling, magnitude)
    else:
        norm, gain = norm.clone(), reference.dora_gain(magnitude, norm)
    xd = launch_dropout(x, dropout, seed) if dropout else x
    xa = project(xd, lora_A.t(), scaling)
    epilogue = (xa, lora_B.t(), bias, gain)
    if dropout:  # (x - drop(x))Wᵀ + g ⊙ z: what is dropped from the adapter still passes the base
        w = dense_weight(base, shape, x.dtype)
        z, _ = gemm(xd, w.t(), xa, lora_B.t())
        y, _ = gemm(x - xd, w.t(), bias=bias)
        y.addcmul_(z, gain.to(x.dtype))
    elif nf4_gemm.takes(x, base):
        y, z = gemm(x, None, *epilogue, keep_z=bias is not None, xw=nf4_gemm.nf4_gemm(x, base, shape[0]))
    else:
        y, z = gemm(x, dense_weight(base, shape, x.dtype).t(), *epilogue, keep_z=bias is not None)
    return y, xa, norm, gain, x.new_empty(0) if z is None else z


@register_fake("dora_linear")
def _(x, weight, absmax, nested_absmax, nested_offset, blocksize, quant_type, norm_sq, norm, lora_A, lora_B, *rest):
    y = x.new_empty(x.shape[0], lora_B.shape[0])
    _, bias, _, dropout, _ = rest
    z = torch.empty_like(y) if dropout or bias is not None else x.new_empty(0)
    xa = x.new_empty(x.shape[0], lora_A.shape[0])
    return y, xa, norm_sq.new_empty(norm_sq.shape), norm_sq.new_empty(norm_sq.shape), z


@define_op("dora_linear_backward")
def _dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    z: Tensor,
    norm: Tensor,
    gain: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    base = (weight, absmax, nested_absmax, nested_offset, blocksize, quant_type)
    w = dense_weight(base, (lora_B.shape[0], lora_A.shape[1]), x.dtype)
    rest = (w, lora_A, lora_B, magnitude, scaling, dropout, seed, needs_dx)
    if not use_triton(x, products=True):
        return reference.dora_linear_backward(dy, x, xa, y, z, norm, gain, *rest)
    return dora_linear_backward(dy, x.contiguous(), xa, y, z, norm, gain, *rest)


@register_fake("dora_linear_backward")
def _(dy, x, xa, y, z, norm, gain, weight, absmax, nested, offset, blocksize, quant_type, lora_A, lora_B, *rest):
    dx = x.new_empty(x.shape) if rest[-1] else x.new_empty(0)
    magnitude = rest[0]
    dA, dB = lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)
    return dx, dA, dB, magnitude.new_empty(magnitude.shape)


def _setup_context(ctx, inputs, output):
    x, *base, blocksize, quant_type, _, _, lora_A, lora_B, magnitude, bias, scaling, dropout, seed = inputs
    y, xa, norm, gain, z = output
    y = None if dropout or bias is not None else y
    ctx.save_for_backward(x, xa, y, z, norm, gain, *base, lora_A, lora_B, magnitude, seed)
    ctx.blocksize, ctx.quant_type, ctx.scaling, ctx.dropout = blocksize, quant_type, scaling, dropout
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # or zeros are made for the outputs that have no gradient
    ctx.mark_non_differentiable(xa, norm, gain, z)


def _backward(ctx, dy, *_):
    x, xa, y, z, norm, gain, *base, lora_A, lora_B, magnitude, seed = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        raise RuntimeError("dora_linear gives no gradient for the base weight: it is frozen")
    dx, dA, dB, dm = _dora_linear_backward(
        dy.contiguous(),
        x,
        xa,
        y,
        z,
        norm,
        gain,
        *base,
        ctx.blocksize,
        ctx.quant_type,
        lora_A,
        lora_B,
        magnitude,
        ctx.scaling,
        ctx.dropout,
        seed,
        ctx.needs_input_grad[0],
    )
    dbias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[12] else None
    dx = dx if ctx.needs_input_grad[0] else None
    return dx, None, None, None, None, None, None, None, None, dA, dB, dm, dbias, None, None, None


register_autograd("dora_linear", _backward, _setup_context)


def dora_linear(
    x: Tensor,
    weight: Tensor,
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
        weight: [out, in] in x's dtype, or packed codes with their `quant_state`. Frozen.
        norm_sq: fp32 [out], what `weight_norm_sq` returns for this weight.
        lora_A: [rank, in], lora_B: [out, rank], magnitude: [out], fp32 in training (a bf16 magnitude stops learning:
            its updates round to zero).
        scaling: α / rank, or α / √rank (rsLoRA).
        bias: [out] or None.
        dropout: probability with which an element of the adapter's input is dropped.
        seed: int64 [], decides the mask; by default drawn from torch's generator.
        norm: fp32 [out], what `dora_norm` returned for this weight, lora_A, lora_B and scaling; computed if not given.

    Returns:
        [..., out] in x's dtype. Differentiable in x, lora_A, lora_B, magnitude and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    base = base_args(weight, quant_state, x)
    out_features = weight.shape[0] if quant_state is None else quant_state.shape[0]
    check_adapter(x, lora_A, lora_B, out_features, bias, dropout)
    for name, vector in {"magnitude": magnitude, "norm_sq": norm_sq, "norm": norm}.items():
        if vector is not None and vector.shape != (out_features,):
            raise ValueError(f"{name} {tuple(vector.shape)} must be [{out_features}]")
    if dropout and seed is None:
        seed = new_seed(x.device)
    y, *_ = _dora_linear(
        x.reshape(-1, x.shape[-1]),
        *base,
        norm_sq,
        norm,
        lora_A,
        lora_B,
        magnitude,
        bias,
        scaling,
        dropout,
        seed,
    )
    return y.view(*x.shape[:-1], out_features)
