"""The linears of all experts in Triton: see kernels/experts.py.

A packed weight becomes dense in parts of at most PART_BYTES (kernels/weight.py), a few experts each. A part is
multiplied before the next one takes its memory, so beside the packed weight a call needs PART_BYTES and its results.
The results have the same bits however many parts there are.

Launches over a packed weight of P parts, however many experts these have: forward of LoRA 1 + 2P (xa; of each part,
dequantize the experts that have rows and the product, with everything else in its epilogue), of DoRA 4 + 2P with the
norm, 2 + 2P with a known one; backward of LoRA 2 + 2P (dxa, dA with dB; dequantize and dX), of DoRA 1 + 4P (dA with dB;
dequantize, dz with dm, dxa and dX). The host never waits: who has how many rows stays on the device. The library's
product takes one launch more. It can only have all experts at once: it multiplies dense weights, and packed ones of
one part.

The products are grouped.py's, the thin ones experts_low_rank.py's, dense weights and norms experts_weights.py's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.case import Case, meta
from kernels.triton.dora import finish_magnitude
from kernels.triton.experts_low_rank import dropout as drop
from kernels.triton.experts_low_rank import outer, project
from kernels.triton.experts_weights import dense_parts, norm_and_gain
from kernels.triton.grouped import grouped
from kernels.triton.launch import cdiv, launch
from kernels.weight import Weight

BLOCK_M, BLOCK_N = 16, 64  # narrow: a program adds over all rows of an expert. With 32 rows some GPUs spilled
FINISH_K = 64  # tile of x and of a row of W in the rare case


@triton.jit(do_not_specialize=["begin"])
def _scale_kernel(
    dy_ptr,  # [M, N]
    kept_ptr,  # y or z, [M, N]
    gain_ptr,  # fp32 [E, N]
    divisor_ptr,  # [E, N]: the magnitude if y was kept, the norm if z was
    norm_ptr,  # fp32 [E, N]
    x_ptr,  # [M, K]
    w_ptr,  # [experts of this launch, N, K], any strides
    xa_ptr,  # [M, R]
    b_ptr,  # [E, N, R], any strides
    ends_ptr,  # i32 [E]
    dz_ptr,  # [M, N]
    dm_ptr,  # [E, N]
    M,
    N,
    K,
    begin,  # the first expert of this launch
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    stride_br,
    R: tl.constexpr,
    KEPT_Y: tl.constexpr,
    SMALL: tl.constexpr,  # gains below it leave too little of z in y
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    start_n = tl.program_id(0) * BLOCK_N
    n = start_n + tl.arange(0, BLOCK_N)
    own = tl.program_id(1).to(tl.int64)  # among the experts of this launch
    e = begin + own
    end = tl.minimum(tl.load(ends_ptr + e), M)
    start = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    gain = tl.load(gain_ptr + e * N + n, mask=n < N, other=0.0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for m0 in range(start, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        places = m[:, None] * N + n[None, :]
        inside = (m < end)[:, None] & (n < N)[None, :]
        dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(kept_ptr + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz_ptr + places, (dy * gain[None, :]).to(dz_ptr.dtype.element_ty), mask=inside)
        total += tl.sum(dy * kept, 0)
    first = start.to(tl.int64)
    gain_ptrs = None
    if KEPT_Y:
        gain_ptrs = gain_ptr + e * N
    finish_magnitude(
        total, divisor_ptr + e * N, gain_ptrs, norm_ptr + e * N,
        dy_ptr + first * N, x_ptr + first * K, w_ptr + own * stride_we, xa_ptr + first * R, b_ptr + e * stride_be,
        dm_ptr + e * N, start_n, end - start, N, K, stride_wn, stride_wk, R, stride_bn, stride_br, R, SMALL,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip


def scale(
    dy: Tensor,
    kept: Tensor,
    x: Tensor,
    xa: Tensor,
    ends: Tensor,
    w: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    gain: Tensor,
    kept_y: bool,
    dz: Tensor,
    dm: Tensor,
    begin: int = 0,
) -> None:
    """Write dz = gain_e ⊙ dy [M, N], nothing in rows that belong to nobody, and dm [E, N], of the experts of w, the
    first of which is expert `begin` of all."""
    (m, n), rank = dy.shape, lora_B.shape[2]
    launch(
        _scale_kernel, (cdiv(n, BLOCK_N), len(w)),
        dy, kept, gain, magnitude.contiguous() if kept_y else norm, norm, x, w, xa, lora_B, ends, dz, dm,
        m, n, x.shape[1], begin, *w.stride(), *lora_B.stride(), R=rank, KEPT_Y=kept_y,
        SMALL=torch.finfo(dy.dtype).tiny, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=FINISH_K, BLOCK_R=16,
        fp_fusion=True,
    )  # fmt: skip


def products(x: Tensor, ends: Tensor, weight: Weight, forward: bool, **epilogue) -> Tensor:
    """`grouped` of x with all experts: with W_eᵀ in forward, in backward with W_e."""
    result = None
    for begin, w in dense_parts(weight, ends, x.dtype):
        result = grouped(x, ends, w.mT if forward else w, **epilogue, begin=begin, into=result)
    return result[0]


def experts_linear(x: Tensor, ends: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return products(x.contiguous(), ends, weight, forward=True, bias=bias)


def experts_linear_backward(dy: Tensor, ends: Tensor, weight: Weight) -> Tensor:
    return products(dy, ends, weight, forward=False)


def experts_lora(
    x: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    xa = project(x, ends, lora_A.mT, scaling, dropout, seed)
    return products(x, ends, weight, forward=True, s=xa, v=lora_B.mT, bias=bias), xa


def experts_lora_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    dxa = project(dy, ends, lora_B, scaling)
    dA, dB = outer(x, dxa, dy, xa, ends, (lora_A.dtype, lora_B.dtype), dropout, seed)
    if not needs_dx:
        return x.new_empty(0), dA, dB
    return products(dy, ends, weight, forward=False, s=dxa, v=lora_A, p=dropout, seed=seed), dA, dB


def experts_norm(weight: Weight, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return norm_and_gain(weight, weight.dtype, lora_A, lora_B, scaling)[0]


def experts_dora(
    x: Tensor,
    ends: Tensor,
    weight: Weight,
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
    x = x.contiguous()
    xd = drop(x, ends, dropout, seed) if dropout else x
    xa = project(xd, ends, lora_A.mT, scaling)
    norm, gain = norm_and_gain(weight, x.dtype, lora_A, lora_B, scaling, magnitude, norm, ends)
    dropped, keeps_z = x - xd if dropout else None, dropout > 0 or bias is not None
    base = result = None
    for begin, w in dense_parts(weight, ends, x.dtype):
        if dropout:  # (x - drop(x))Wᵀ + g ⊙ z: elements dropped from the adapter still pass the base
            base = grouped(dropped, ends, w.mT, begin=begin, into=base)
        added = None if base is None else base[0]
        result = grouped(xd, ends, w.mT, xa, lora_B.mT, bias, gain, added, keeps_z, begin=begin, into=result)
    y, z = result
    return y, xa, norm, gain, z if keeps_z else x.new_empty(0)


def experts_dora_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    z: Tensor,
    norm: Tensor,
    gain: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    xd = drop(x, ends, dropout, seed) if dropout else x
    kept, kept_y = (z, False) if y is None else (y, True)
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    dm = torch.empty(gain.shape, dtype=magnitude.dtype, device=dy.device)
    dxa = dx = through_base = None
    for begin, w in dense_parts(weight, ends, x.dtype):
        scale(dy, kept, xd, xa, ends, w, lora_B, magnitude, norm, gain, kept_y, dz, dm, begin)
        dxa = project(dz, ends, lora_B, scaling, part=(begin, len(w)), into=dxa)
        if needs_dx:
            dx = grouped(dz, ends, w, dxa, lora_A, begin=begin, into=dx)
            if dropout:
                through_base = grouped(dy, ends, w, begin=begin, into=through_base)
    dA, dB = outer(xd, dxa, dz, xa, ends, (lora_A.dtype, lora_B.dtype))
    if not needs_dx:
        return x.new_empty(0), dA, dB, dm
    if dropout:  # elements dropped from the adapter's input pass the base alone
        (dx, _), (through_base, _) = dx, through_base
        return through_base + drop(dx - through_base, ends, dropout, seed), dA, dB, dm
    return dx[0], dA, dB, dm


def _scale_case(kept_y: bool, dtype: str) -> Case:
    """`scale` of 128 experts 2048 → 768, counted without the rare columns of small gain."""
    dy, x, xa = (meta(32768, n, dtype=dtype) for n in (768, 2048, 16))
    w, lora_B, of_rows = meta(128, 768, 2048, dtype=dtype), meta(128, 768, 16), meta(128, 768)
    rest = (w, lora_B, of_rows, of_rows, of_rows, kept_y, dy, of_rows)
    return Case(
        kernel="experts_scale",
        config=f"{'y' if kept_y else 'z'}-{dtype}",
        call=lambda: scale(dy, dy, x, xa, meta(128, dtype=torch.int32), *rest),
        fn=_scale_kernel,
        values=BLOCK_M * BLOCK_N,
        bytes_per_value={"bf16": 6.0, "fp32": 12.0}[dtype],
        loop=not kept_y,  # else the innermost loops are those of the rare columns
        min_load_bits=128,
        min_store_bits=128,
    )


CASES = [_scale_case(kept_y, dtype) for kept_y in (True, False) for dtype in ("bf16", "fp32")]
