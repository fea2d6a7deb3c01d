"""Adapted linears of one input on a CPU, as an attention's queries, keys and values are.

    Ā = [s₁A₁; …; sₙAₙ],   [xa₁ … xaₙ] = x Āᵀ
    [dA₁; …; dAₙ] = s ⊙ [dxa₁ … dxaₙ]ᵀ x,   dx = [dxa₁ … dxaₙ] Ā + Σᵢ dzᵢ Wᵢ

A product with A is thin: it takes about as long as reading x. Here three do for all the linears what else are three for
each, and the gradients of x need not be added up. The rest is as in reference.py: LoRA's dz is dy, DoRA's g ⊙ dy.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.base_weight import BaseArgs, dense_weight


class Linear(NamedTuple):
    """What of an adapted linear does not train.

    Attributes:
        base: the weight, see `base_weight.base_args`.
        norm_sq: DoRA's ‖W‖², fp32 [out]; None: LoRA.
    """

    base: BaseArgs
    scaling: float
    norm_sq: Tensor | None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, linears: list[Linear], *adapters: Tensor | None):
        ctx.linears, ctx.ranks = linears, [A.shape[0] for A in adapters[::3]]
        a_all = x.new_empty(sum(ctx.ranks), x.shape[1])
        parts, outputs, kept = a_all.split(ctx.ranks), [], []
        factors = [
            reference.factors(A, B, linear.scaling, 1.0, x.dtype, a)
            for linear, A, B, a in zip(linears, adapters[::3], adapters[1::3], parts)
        ]
        xa_all = torch.mm(x, a_all.t())
        for linear, xa, (a, b), (A, B, magnitude) in zip(
            linears, xa_all.split(ctx.ranks, 1), factors, _triples(adapters)
        ):
            w = dense_weight(linear.base, (B.shape[0], A.shape[1]), x.dtype)
            norm = gain = None
            if linear.norm_sq is not None:
                norm, gain = reference.norm_and_gain(w, linear.norm_sq, A, B, a, linear.scaling, magnitude)
            y = reference.linear(xa, b, None).addmm_(x, w.t())
            outputs.append(y if gain is None else reference.scale_columns_(y, gain))
            kept += [b, outputs[-1] if gain is not None else None, norm, gain]
        ctx.save_for_backward(x, a_all, xa_all, *kept, *adapters)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, a_all, xa_all, *rest = ctx.saved_tensors
        count = len(ctx.linears)
        kept, adapters = list(zip(*[iter(rest[: 4 * count])] * 4)), _triples(rest[4 * count :])
        scaled = []
        for dy, (_, y, _, gain) in zip(dys, kept):
            dy = dy.contiguous()
            scaled.append((dy, None) if gain is None else reference.scale_columns(dy, y, gain))
        dxa_all = torch.cat([torch.mm(dz, b) for (dz, _), (b, *_) in zip(scaled, kept)], 1)
        dA_all = torch.mm(dxa_all.t(), x)
        dx = torch.mm(dxa_all, a_all) if ctx.needs_input_grad[0] else None
        gradients = []
        for i, (linear, (dz, total), xa, dA, (A, B, magnitude)) in enumerate(
            zip(ctx.linears, scaled, xa_all.split(ctx.ranks, 1), dA_all.split(ctx.ranks), adapters)
        ):
            if dx is not None or total is not None:
                w = dense_weight(linear.base, (B.shape[0], A.shape[1]), x.dtype)
            if dx is not None:
                dx.addmm_(dz, w)
            gradients += reference.wide_gradients(dA, torch.mm(dz.t(), xa), A, B, linear.scaling)
            _, _, norm, gain = kept[i]
            gradients.append(
                None
                if total is None
                else reference.magnitude_gradient(total, dys[i], x, w, A, B, magnitude, linear.scaling, norm, gain)
            )
        return dx, None, *gradients


def _triples(adapters) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    return list(zip(adapters[::3], adapters[1::3], adapters[2::3]))


def adapted_linears(
    x: Tensor, linears: list[Linear], adapters: list[tuple[Tensor, Tensor, Tensor | None]]
) -> tuple[Tensor, ...]:
    """What `lora_linear` or `dora_linear` gives for each of `linears`, without dropout and bias.

    Args:
        x: [..., in] on a CPU.
        adapters: lora_A [rank, in], lora_B [out, rank] and DoRA's magnitude [out] of each linear.

    Returns:
        [..., out] of each. Differentiable in x and the adapters.
    """
    flat = [tensor for adapter in adapters for tensor in adapter]
    outputs = _Linears.apply(x.reshape(-1, x.shape[-1]), linears, *flat)
    return tuple(y.view(*x.shape[:-1], -1) for y in outputs)
