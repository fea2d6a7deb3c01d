"""8-bit AdamW in Triton, every tensor in one launch: see kernels/adamw8bit.py."""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamw8bit import BLOCKSIZE
from kernels.codebook import dynamic_bounds, dynamic_map
from kernels.triton.adamw import loaded, moments, on_host_or_device, updated
from kernels.triton.case import Case, meta
from kernels.triton.launch import launch
from kernels.triton.multi_tensor import plan, pointer, tensor_of_program

BLOCKS = 4  # a program's, one a warp: the maximum of a block needs no shared memory
NUM_WARPS = 4
_BLOCKSIZE, _TINY_BITS = tl.constexpr(BLOCKSIZE), tl.constexpr(0x00800000)  # 2⁻¹²⁶
_ROUND, _ROUND_BITS = tl.constexpr(1.5 * 2**23), tl.constexpr(0x4B400000)


@triton.jit
def _nearest_code(x, bounds, SIGNED: tl.constexpr):  # [n] in [-1, 1] → i32
    """The number of bounds below x.

    Above 0 the map has S · 2ᵉ values in the decade from 10ᵉ⁻⁷ to 10ᵉ⁻⁶, e = 0 … 6, evenly spread. The size of x tells
    the last map value that is at least half a step below x, up to a rounding. The code of x is that value's code or the
    next. One comparison with the bound between them decides.
    """
    S: tl.constexpr = 1 if SIGNED else 2
    size, values = tl.abs(x), 64.0 * S  # the size is brought into the last decade, 0.1 to 1
    size, values = tl.where(size < 1e-4, size * 1e4, size), tl.where(size < 1e-4, values / 16, values)
    size, values = tl.where(size < 1e-2, size * 1e2, size), tl.where(size < 1e-2, values / 4, values)
    size, values = tl.where(size < 1e-1, size * 10, size), tl.where(size < 1e-1, values / 2, values)
    # values · (1 + (size - 0.1) / 0.9) counts the values up to x from the first decade's. Adding 1.5 · 2²³ rounds to
    # the nearest integer and leaves it in the lower bits.
    count = tl.fma(values, tl.fma(size, 1 / 0.9, 8 / 9), _ROUND - 1)
    below = count.to(tl.int32, bitcast=True) - _ROUND_BITS
    if SIGNED:
        below = (below ^ (x.to(tl.int32, bitcast=True) >> 31)) + 127  # mirrored below 0
    else:
        below = below - 1
    below = tl.maximum(below, 0)
    return below + (x > tl.gather(bounds, below, 0)).to(tl.int32)


@triton.jit
def _load_state(code_ptr, absmax_ptr, map_ptr, i, block, live, blocks, BLOCKS: tl.constexpr):
    code = tl.load(code_ptr + i, mask=i < live, other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + block, mask=block < blocks, other=0.0)
    level = tl.load(map_ptr + tl.arange(0, 256))
    value = tl.reshape(tl.gather(level, code, 0), [BLOCKS, _BLOCKSIZE]) * absmax[:, None]
    return tl.where(i < live, tl.reshape(value, [BLOCKS * _BLOCKSIZE]), 0.0)


@triton.jit
def _store_state(
    x, code_ptr, absmax_ptr, bounds_ptr, i, block, live, blocks, SIGNED: tl.constexpr, BLOCKS: tl.constexpr
):
    x = tl.reshape(x, [BLOCKS, _BLOCKSIZE])
    # As integers the bits of |x| order as the numbers do, with NaN above them all: a NaN is never lost.
    absmax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # [BLOCKS]
    inverse = tl.math.div_rn(1.0, tl.maximum(absmax, _TINY_BITS).to(tl.float32, bitcast=True))
    scaled = tl.reshape(x * inverse[:, None], [BLOCKS * _BLOCKSIZE])
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    code = _nearest_code(scaled, tl.load(bounds_ptr + tl.arange(0, 256)), SIGNED)
    tl.store(code_ptr + i, code.to(tl.uint8), mask=i < live)
    tl.store(absmax_ptr + block, absmax.to(tl.float32, bitcast=True), mask=block < blocks)


@triton.jit
def _adamw8bit_tile(
    p_ptr, g_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, m_map_ptr, v_map_ptr, m_bounds_ptr, v_bounds_ptr,
    live, blocks,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, denominator_scale,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCKS * _BLOCKSIZE)
    block = tl.arange(0, BLOCKS)
    mask = i < live
    g = tl.load(g_ptr + i, mask=mask, other=0.0)
    p = tl.load(p_ptr + i, mask=mask, other=0.0)
    m = _load_state(m_ptr, m_absmax_ptr, m_map_ptr, i, block, live, blocks, BLOCKS)
    v = _load_state(v_ptr, v_absmax_ptr, v_map_ptr, i, block, live, blocks, BLOCKS)
    m, v = moments(m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2)
    tl.store(p_ptr + i, updated(p, m, v, eps, decay, step_size, denominator_scale), mask=mask)
    _store_state(m, m_ptr, m_absmax_ptr, m_bounds_ptr, i, block, live, blocks, True, BLOCKS)
    _store_state(v, v_ptr, v_absmax_ptr, v_bounds_ptr, i, block, live, blocks, False, BLOCKS)


@triton.jit
def _adamw8bit_kernel(
    table_ptr,  # i64 [8, tensors]: addresses of p and g, fp32, codes of m and v, u8, their absmax, fp32
    owner_ptr,  # i32 [programs]
    m_map_ptr, v_map_ptr, m_bounds_ptr, v_bounds_ptr,  # fp32 [256]
    tensors,
    by_ptr,  # fp32 [8], the coefficients in a graph; None: they are the numbers that follow
    found_inf_ptr,  # fp32 []: nothing changes unless it is 0; or None
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, denominator_scale,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCKS * _BLOCKSIZE
    tensor, n, tile = tensor_of_program(table_ptr, owner_ptr, tensors, 6)
    start = tile * TILE
    if by_ptr is not None:
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, denominator_scale = loaded(by_ptr)
    if found_inf_ptr is not None:
        n = tl.where(tl.load(found_inf_ptr) == 0, n, start)
    p_ptr = pointer(table_ptr, tensors, tensor, 0, tl.float32, ALIGNED) + start
    g_ptr = pointer(table_ptr, tensors, tensor, 1, tl.float32, ALIGNED) + start
    m_ptr = pointer(table_ptr, tensors, tensor, 2, tl.uint8, ALIGNED) + start
    v_ptr = pointer(table_ptr, tensors, tensor, 3, tl.uint8, ALIGNED) + start
    m_absmax_ptr = pointer(table_ptr, tensors, tensor, 4, tl.float32, ALIGNED) + tile * BLOCKS
    v_absmax_ptr = pointer(table_ptr, tensors, tensor, 5, tl.float32, ALIGNED) + tile * BLOCKS
    if start + TILE <= n:  # without a mask, that loads may be wide
        _adamw8bit_tile(p_ptr, g_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, m_map_ptr, v_map_ptr, m_bounds_ptr,
                        v_bounds_ptr, TILE, BLOCKS, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay,
                        step_size, denominator_scale, BLOCKS)  # fmt: skip
    else:
        live = (n - start).to(tl.int32)
        _adamw8bit_tile(p_ptr, g_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, m_map_ptr, v_map_ptr, m_bounds_ptr,
                        v_bounds_ptr, live, tl.cdiv(live, _BLOCKSIZE), beta1, one_minus_beta1, beta2,
                        one_minus_beta2, eps, decay, step_size, denominator_scale, BLOCKS)  # fmt: skip


def _maps(device: torch.device) -> tuple[Tensor, ...]:
    signs = (True, False)
    return *(dynamic_map(device, signed) for signed in signs), *(dynamic_bounds(device, signed) for signed in signs)


def adamw8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
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
    state = (exp_avgs, exp_avg_sqs, exp_avg_absmax, exp_avg_sq_absmax)
    torch.autograd.graph.increment_version([*params, *itertools.chain(*state)])
    table, owner, programs, aligned = plan((params, grads, *state), BLOCKS * BLOCKSIZE)
    by = on_host_or_device(lr, beta1, beta2, eps, weight_decay, step, device_lr, device_step)
    args = (table, owner, *_maps(table.device), table.shape[1], by[0], found_inf, *by[1])
    options = {"ALIGNED": aligned, "BLOCKS": BLOCKS, "num_warps": NUM_WARPS}
    launch(_adamw8bit_kernel, (programs,), *args, **options, fp_fusion=False)


def _case(aligned: bool, capturable: bool = False) -> Case:
    on_device = (meta(dtype=torch.float64), meta(), meta()) if capturable else ()
    params = [meta(BLOCKSIZE + 1)[0 if aligned else 1 :] for _ in range(3)]
    codes, absmax = [meta(BLOCKSIZE, dtype=torch.uint8)] * 3, [meta(1)] * 3
    tensors, numbers = (params, params, codes, codes, absmax, absmax), (1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    return Case(
        kernel="adamw8bit",
        config=("fp32" if aligned else "fp32-unaligned") + "-capturable" * capturable,
        call=lambda: adamw8bit(*tensors, *numbers, *on_device),
        fn=_adamw8bit_kernel,
        values=BLOCKS * BLOCKSIZE,
        bytes_per_value=16 + 4 * 4 / BLOCKSIZE,
        max_instr=119.0 if aligned else 135.0,
        max_registers=96,
        min_load_bits=128 if aligned else 32,
        min_store_bits=128 if aligned else 32,
    )


CASES = [_case(aligned=True), _case(aligned=False), _case(aligned=True, capturable=True)]
