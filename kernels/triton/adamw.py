"""AdamW in Triton, every tensor in one launch: see kernels/adamw.py."""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamw import Coefficients, coefficients, device_coefficients
from kernels.triton.case import Case, meta
from kernels.triton.launch import launch
from kernels.triton.multi_tensor import plan, pointer, tensor_of_program

TILE = 1024  # 8 elements a thread: two 128-bit loads of each argument in flight


@triton.jit
def moments(m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2):
    """The new (m, v)."""
    return m * beta1 + g * one_minus_beta1, v * beta2 + g * g * one_minus_beta2


@triton.jit
def updated(p, m, v, eps, decay, step_size, denominator_scale):
    """The new p, from the new m and v."""
    return p * decay - tl.math.div_rn(m, tl.math.sqrt_rn(v) * denominator_scale + eps) * step_size


@triton.jit
def loaded(by_ptr):
    """The coefficients fp32 [8] one by one."""
    return (tl.load(by_ptr), tl.load(by_ptr + 1), tl.load(by_ptr + 2), tl.load(by_ptr + 3), tl.load(by_ptr + 4),
            tl.load(by_ptr + 5), tl.load(by_ptr + 6), tl.load(by_ptr + 7))  # fmt: skip


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
    by_ptr,  # fp32 [8], the coefficients in a graph; None: they are the numbers that follow
    found_inf_ptr,  # fp32 []: nothing changes unless it is 0; or None
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, denominator_scale,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    tensor, n, tile = tensor_of_program(table_ptr, owner_ptr, tensors, 4)
    start = tile * TILE
    if by_ptr is not None:
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, denominator_scale = loaded(by_ptr)
    if found_inf_ptr is not None:
        n = tl.where(tl.load(found_inf_ptr) == 0, n, start)
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


def adamw(
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
    torch.autograd.graph.increment_version([*params, *itertools.chain(exp_avgs, exp_avg_sqs)])
    table, owner, programs, aligned = plan((params, grads, exp_avgs, exp_avg_sqs), TILE)
    by = on_host_or_device(lr, beta1, beta2, eps, weight_decay, step, device_lr, device_step)
    args = (table, owner, table.shape[1], by[0], found_inf, *by[1])
    launch(_adamw_kernel, (programs,), *args, ALIGNED=aligned, TILE=TILE, fp_fusion=False)


def on_host_or_device(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    device_lr: Tensor | None,
    device_step: Tensor | None,
) -> tuple[Tensor | None, Coefficients]:
    """(by, the numbers) as the kernels take the coefficients. Where `by` is there, the numbers say nothing."""
    if device_step is None:
        return None, coefficients(lr, beta1, beta2, eps, weight_decay, step)
    by = device_coefficients(device_lr, beta1, beta2, eps, weight_decay, device_step)
    return by, Coefficients(*(0.0,) * len(Coefficients._fields))


def _case(aligned: bool, capturable: bool = False) -> Case:
    on_device = (meta(dtype=torch.float64), meta(), meta()) if capturable else ()
    tensors = [meta(TILE + 1)[0 if aligned else 1 :] for _ in range(3)]
    return Case(
        kernel="adamw",
        config=("fp32" if aligned else "fp32-unaligned") + "-capturable" * capturable,
        call=lambda: adamw(tensors, tensors, tensors, tensors, 1e-3, 0.9, 0.999, 1e-8, 0.01, 1, *on_device),
        fn=_adamw_kernel,
        values=TILE,
        bytes_per_value=28.0,
        max_instr=(44.0 if capturable else 43.0) if aligned else 49.0,  # coefficients are loaded
        max_registers=64,
        min_load_bits=128 if aligned else 32,
        min_store_bits=128 if aligned else 32,
    )


CASES = [_case(aligned=True), _case(aligned=False), _case(aligned=True, capturable=True)]
