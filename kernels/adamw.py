"""AdamW in fp32, every tensor in one launch.

    m = β₁ m + (1 - β₁) g
    v = β₂ v + (1 - β₂) g²
    p = (1 - lr·λ) p - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)         t = 1, 2, …

Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW orders it. Each element is read once and written once:
28 bytes. Nothing is materialised. An element's result does not depend on where a tensor is cut between blocks of 256.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference_adamw
from kernels.dispatch import use_triton
from kernels.library import define_op, register_fake
from kernels.multi_tensor import plan, pointer, tensor_of_program
from kernels.spec import KernelSpec

TILE = 1024  # 8 elements a thread: two 128-bit loads of each argument in flight


class Coefficients(NamedTuple):
    """What a step multiplies with; each is rounded to fp32 when it is used."""

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


@triton.jit
def moments(m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2):
    """The new (m, v)."""
    return m * beta1 + g * one_minus_beta1, v * beta2 + g * g * one_minus_beta2


@triton.jit
def updated(p, m, v, eps, decay, step_size, denominator_scale):
    """The new p, from the new m and v."""
    return p * decay - tl.math.div_rn(m, tl.math.sqrt_rn(v) * denominator_scale + eps) * step_size


@triton.jit
def _adamw_tile(
    p_ptr, g_ptr, m_ptr, v_ptr, live,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, denominator_scale,
    TILE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, TILE)
    mask = i < live
    g = tl.load(g_ptr + i, mask=mask, other=0.0)
    m = tl.load(m_ptr + i, mask=mask, other=0.0)
    v = tl.load(v_ptr + i, mask=mask, other=0.0)
    m, v = moments(m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2)
    tl.store(m_ptr + i, m, mask=mask)
    tl.store(v_ptr + i, v, mask=mask)
    p = tl.load(p_ptr + i, mask=mask, other=0.0)
    tl.store(p_ptr + i, updated(p, m, v, eps, decay, step_size, denominator_scale), mask=mask)


@triton.jit
def _adamw_kernel(
    table_ptr,  # i64 [6, tensors]: addresses of p, g, m and v, all fp32; see multi_tensor.py
    owner_ptr,  # i32 [programs]
    tensors,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, denominator_scale,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    tensor, n, tile = tensor_of_program(table_ptr, owner_ptr, tensors, 4)
    start = tile * TILE
    p_ptr = pointer(table_ptr, tensors, tensor, 0, tl.float32, ALIGNED) + start
    g_ptr = pointer(table_ptr, tensors, tensor, 1, tl.float32, ALIGNED) + start
    m_ptr = pointer(table_ptr, tensors, tensor, 2, tl.float32, ALIGNED) + start
    v_ptr = pointer(table_ptr, tensors, tensor, 3, tl.float32, ALIGNED) + start
    if start + TILE <= n:  # without a mask, that loads may be wide
        _adamw_tile(p_ptr, g_ptr, m_ptr, v_ptr, TILE, beta1, one_minus_beta1, beta2, one_minus_beta2,
                    eps, decay, step_size, denominator_scale, TILE)  # fmt: skip
    else:
        _adamw_tile(p_ptr, g_ptr, m_ptr, v_ptr, (n - start).to(tl.int32), beta1, one_minus_beta1, beta2,
                    one_minus_beta2, eps, decay, step_size, denominator_scale, TILE)  # fmt: skip


def _launch(arguments: tuple[Sequence[Tensor], ...], *hyper: float) -> None:
    params, _, *moments = arguments
    torch.autograd.graph.increment_version([*params, *itertools.chain(*moments)])
    table, owner, programs, aligned = plan(arguments, TILE)
    if programs:
        with torch.cuda.device_of(table):
            _adamw_kernel[(programs,)](
                table, owner, table.shape[1], *coefficients(*hyper), ALIGNED=aligned, TILE=TILE, enable_fp_fusion=False
            )


@define_op("adamw", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
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
    update = _launch if use_triton(params[0]) else reference_adamw.adamw
    update((params, grads, exp_avgs, exp_avg_sqs), lr, beta1, beta2, eps, weight_decay, step)


@register_fake("adamw")
def _(params, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay, step):
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


AOT_SPECS = [
    KernelSpec(
        kernel="adamw",
        config="fp32" if aligned else "fp32-unaligned",
        fn=_adamw_kernel,
        signature={"table_ptr": "*i64", "owner_ptr": "*i32", "tensors": "i32"}
        | dict.fromkeys(Coefficients._fields, "fp32"),
        constexprs={"ALIGNED": aligned, "TILE": TILE},
        values=TILE,
        bytes_per_value=28.0,
        max_instr=43.0 if aligned else 49.0,
        max_registers=64,
        min_load_bits=128 if aligned else 32,
        min_store_bits=128 if aligned else 32,
    )
    for aligned in (True, False)
]
