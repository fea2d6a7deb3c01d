"""AdamW in fp32, every tensor in one call.

    m = β₁ m + (1 - β₁) g
    v = β₂ v + (1 - β₂) g²
    p = (1 - lr·λ) p - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)         t = 1, 2, …

Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW orders it. Each element is read once and written once:
28 bytes. Nothing is materialised. An element's result does not depend on where a tensor is cut between blocks of 256.

In a CUDA graph lr and t change from replay to replay: there they are tensors on the device. `found_inf` on the device
skips the step, as torch's fused optimizers do.
"""

import functools
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


@functools.lru_cache(maxsize=64)
def _constants(beta1: float, beta2: float, eps: float, device: torch.device) -> Tensor:
    return torch.tensor([beta1, 1 - beta1, beta2, 1 - beta2, eps], dtype=torch.float64, device="cpu").to(device)


def device_coefficients(
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float, step: Tensor
) -> Tensor:
    """The `Coefficients` fp32 [8] of lr [] and step [] on their device, without a look at them."""
    by = coefficients(lr.double(), beta1, beta2, eps, weight_decay, step.double())
    moving = torch.stack([by.decay, by.step_size, by.denominator_scale])
    return torch.cat([_constants(beta1, beta2, eps, step.device), moving]).float()


def split_tensors(lr: float | Tensor, step: int | Tensor) -> tuple[float, int, Tensor | None, Tensor | None]:
    """(lr, step, device_lr, device_step) as the ops take them: numbers, or two tensors.

    Raises:
        ValueError: one of them is a tensor, and the other is not.
    """
    if isinstance(lr, Tensor) != isinstance(step, Tensor):
        raise ValueError(
            f"lr and step must be two numbers or two tensors, not {type(lr).__name__} and {type(step).__name__}"
        )
    return (0.0, 1, lr, step) if isinstance(step, Tensor) else (lr, step, None, None)


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
    device_lr: Tensor | None = None,
    device_step: Tensor | None = None,
    found_inf: Tensor | None = None,
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
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int | Tensor,
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW on every tensor of `params`, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: fp32, contiguous, on one device; tensors of the same index have the same
            number of elements. All but grads are updated.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        step: this step's number, from 1.
        found_inf: fp32 [] on the device; nothing changes unless it is 0. lr [] fp64 and step [] fp32 are tensors then.

    Raises:
        ValueError: tensors that do not fit.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_tensors(params, ((name, tensors, torch.float32) for name, tensors in lists.items()))
    if params:
        lr, step, *tensors = split_tensors(lr, step)
        _adamw(*map(list, lists.values()), lr, *betas, eps, weight_decay, step, *tensors, found_inf)
