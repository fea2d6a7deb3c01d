"""Adapted linears that read one input, as an attention's queries, keys and values do, and a gated MLP's gate and up.

    Ā = [s₁A₁; …; sₙAₙ],   [xa₁ … xaₙ] = x Āᵀ
    yᵢ = gᵢ ⊙ (x Wᵢᵀ + xaᵢ Bᵢᵀ)                                    gᵢ = 1 for LoRA, m / ‖W + sBA‖ for DoRA

    dzᵢ = gᵢ ⊙ dyᵢ,   dxaᵢ = dzᵢ Bᵢ,   dBᵢ = dzᵢᵀ xaᵢ
    [dA₁; …; dAₙ] = s ⊙ [dxa₁ … dxaₙ]ᵀ x,   dx = [dxa₁ … dxaₙ] Ā + Σᵢ dzᵢ Wᵢ

A product with A takes about as long as reading x. Three thin products serve all the linears; separately, each linear
needs three. The op returns one gradient of x, so nothing is left to add. dm is that of dora.py. No dropout, no bias.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.op import define_op
from kernels.weight import Weight, check_adapter, check_input


class Joined(NamedTuple):
    """One of the linears.

    Attributes:
        weight: [out, in], frozen.
        lora_A: [rank, in], lora_B: [out, rank].
        scaling: α / rank, or α / √rank (rsLoRA).
        magnitude, norm_sq: DoRA's, fp32 [out]; None: LoRA.
        norm: DoRA's, fp32 [out], as `dora_norm` returned it. Computed if not given.
    """

    weight: Weight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    norm_sq: Tensor | None = None
    norm: Tensor | None = None


@define_op(products=True)
def _joined_linears(
    x: Tensor,
    weights: list[Weight],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    magnitude: list[Tensor | None],
    norm_sq: list[Tensor | None],
    norm: list[Tensor | None],
    scaling: list[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """(y of each [T, out]; the rest is for backward: Ā [Σ r, in], all xa [T, Σ r], each B in x's dtype, the norm and
    the gain of each, fp32 [out], empty for LoRA)"""
    ranks, tokens = sum(len(A) for A in lora_A), len(x)
    ys = [x.new_empty(tokens, len(B)) for B in lora_B]
    vectors = [x.new_empty(0 if m is None else len(m), dtype=torch.float32) for m in (*magnitude, *magnitude)]
    return ys, [x.new_empty(ranks, x.shape[1]), x.new_empty(tokens, ranks), *map(_like(x), lora_B), *vectors]


@define_op(products=True)
def _joined_linears_backward(
    dys: list[Tensor],
    x: Tensor,
    ys: list[Tensor | None],
    kept: list[Tensor],
    weights: list[Weight],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    magnitude: list[Tensor | None],
    scaling: list[float],
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """(dx [T, in] or no element, dA and dB of each, dm of each or no element); the dys are contiguous."""
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    dm = [x.new_empty(0) if m is None else m.new_empty(m.shape) for m in magnitude]
    return dx, [A.new_empty(A.shape) for A in lora_A], [B.new_empty(B.shape) for B in lora_B], dm


def _like(x: Tensor):
    return lambda tensor: x.new_empty(tensor.shape)


def _keep(inputs, results) -> dict:
    ys, kept = results
    needed_ys = [None if m is None else y for m, y in zip(inputs.magnitude, ys)]  # LoRA's backward needs no y
    return {
        **{"x": inputs.x, "ys": needed_ys, "kept": list(kept), "weights": tuple(inputs.weights)},
        **{"lora_A": list(inputs.lora_A), "lora_B": list(inputs.lora_B), "magnitude": list(inputs.magnitude)},
        "scaling": tuple(inputs.scaling),
    }


def _backward(kept, needs, dys: list[Tensor | None], _) -> dict:
    dys = [kept.x.new_zeros(len(kept.x), len(B)) if dy is None else dy.contiguous() for dy, B in zip(dys, kept.lora_B)]
    dx, dA, dB, dm = _joined_linears_backward(
        *(dys, kept.x, kept.ys, kept.kept, list(kept.weights), kept.lora_A, kept.lora_B, kept.magnitude),
        *(list(kept.scaling), needs.x),
    )
    magnitude = [None if m is None else d for m, d in zip(kept.magnitude, dm)]
    return {"x": dx if needs.x else None, "lora_A": dA, "lora_B": dB, "magnitude": magnitude}


_joined_linears.differentiate(_keep, _backward)


def joined_linears(x: Tensor, linears: Sequence[Joined]) -> tuple[Tensor, ...]:
    """The results of `lora_linear` or `dora_linear` for each of `linears`, without dropout and bias.

    Args:
        x: [..., in], fp32, fp16 or bf16: the compute dtype.

    Returns:
        [..., out] of each in x's dtype. Differentiable in x, lora_A, lora_B and magnitude.

    Raises:
        ValueError: no linears, shapes or dtypes that do not fit, a magnitude without norm_sq, a norm without both.
    """
    if not linears:
        raise ValueError("joined_linears needs at least one linear")
    for linear in linears:
        check_input(x, linear.weight)
        out_features = linear.weight.shape[0]
        check_adapter(x, linear.lora_A, linear.lora_B, out_features)
        for name, vector in {"magnitude": linear.magnitude, "norm_sq": linear.norm_sq, "norm": linear.norm}.items():
            if vector is not None and vector.shape != (out_features,):
                raise ValueError(f"{name} {tuple(vector.shape)} must be [{out_features}]")
        of_lora = linear.magnitude is None
        if of_lora != (linear.norm_sq is None) or (of_lora and linear.norm is not None):
            raise ValueError("a DoRA linear needs its magnitude and its norm_sq, a LoRA linear neither")
    weights, lora_A, lora_B, scaling, *of_dora = map(list, zip(*linears))
    ys, _ = _joined_linears(x.reshape(-1, x.shape[-1]), weights, lora_A, lora_B, *of_dora, scaling)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)
