"""AdamW in fp32, every tensor in one call.

    m = β₁ m + (1 - β₁) g
    v = β₂ v + (1 - β₂) g²
    p = (1 - lr·λ) p - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)         t = 1, 2, …

Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW orders it. Each element is read once and written once:
28 bytes. Nothing is materialised. An element's result does not depend on where a tensor is cut between blocks of 256.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.op import define_op


class Coefficients(NamedTuple):
    """The factors and terms of a step, each of them rounded to fp32 when it is used."""

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    decay: float  # 1 - lr·λ
    step_size: float  # lr / (1 - β₁ᵗ)
    denominator_scale: float  # 1 / √(1 - β₂ᵗ)


def coefficients(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> Coefficients:
    step_size, denominator_scale = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    return Coefficients(beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, step_size, denominator_scale)


@define_op(mutates=("params", "exp_avgs", "exp_avg_sqs"))
def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    return None


def check_tensors(
    params: Sequence[Tensor],
    arguments: Iterable[tuple[str, Sequence[Tensor], torch.dtype]],
    elements: Callable[[int], int] = int,
) -> None:
    """Compare (name, tensors, dtype) of each argument with `params`.

    Args:
        elements: how many a tensor has for a parameter of n.

    Raises:
        ValueError: lists of different lengths; a tensor of another dtype, device or number of elements, or one that
            is not contiguous.
    """
    device = params[0].device if params else None
    sizes = [elements(p.numel()) for p in params]
    for name, tensors, dtype in arguments:
        if len(tensors) != len(params):
            raise ValueError(f"{len(params)} params but {len(tensors)} {name}")
        for i, (tensor, n) in enumerate(zip(tensors, sizes)):
            if tensor.dtype != dtype or tensor.numel() != n or tensor.device != device or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] must be contiguous {dtype} of {n} values on {device}, not {tensor.dtype} "
                    f"{list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
                )


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
) -> None:
    """One step of AdamW on every tensor of `params`, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: fp32, contiguous, on one device; tensors of the same index have the same
            number of elements. All but grads are updated.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        step: this step's number, from 1.

    Raises:
        ValueError: tensors that do not fit.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_tensors(params, ((name, tensors, torch.float32) for name, tensors in lists.items()))
    if params:
        _adamw(*map(list, lists.values()), lr, *betas, eps, weight_decay, step)
