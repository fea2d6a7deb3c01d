"""DoRA in Triton: see kernels/dora.py.

Forward over a packed weight: the norm in three launches, or one for the gain of a known norm (dora_norm.py);
dequantize, xa, and the product with gain and bias in its epilogue (gemm.py). Few tokens skip the dequantization. Of few
tokens whose norm is given, one launch makes xa and the gain (few_tokens.py), and one or two the rest (nf4_linear.py):
generation passes the norm.

Backward is LoRA's of dZ = g ⊙ dY, and the magnitude's gradient. One pass over dY and y (or z) makes dZ and partial sums
of dm. Each program handles one tile. A program that walks all columns could also make dxa, but there would be too few
programs for a GPU. Where |gain| is tiny, y has lost z. The finishing kernel then computes dm from x, W and the adapter.
The host does not wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import few_tokens
from kernels.triton.case import Case, meta
from kernels.triton.dora_norm import divide, norm_and_gain, sums_of_squares
from kernels.triton.dropout import dropout as drop
from kernels.triton.gemm import gemm
from kernels.triton.launch import cdiv, launch
from kernels.triton.low_rank import project
from kernels.triton.nf4 import dense
from kernels.triton.nf4_linear import product
from kernels.triton.outer import outer
from kernels.weight import Weight

BLOCK_M, BLOCK_N = 32, 128
FINISH_N = 32  # columns of dm a program finishes
FINISH_M = 32  # tile of x and of a row of W in the rare case
FINISH_K = 128


@triton.jit
def _scale_kernel(
    dy_ptr,  # [M, N]
    kept_ptr,  # y or z, [M, N]
    gain_ptr,  # fp32 [N]
    dz_ptr,  # [M, N]
    partial_ptr,  # fp32 [tiles of M, N]: Σ dy ⊙ kept
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    offsets = m[:, None] * N + n[None, :]
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(kept_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + n, mask=n < N, other=0.0)
    tl.store(dz_ptr + offsets, (dy * gain[None, :]).to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tile * N + n, tl.sum(dy * kept, 0), mask=n < N)


@triton.jit
def _magnitude_grad_kernel(
    partial_ptr,  # fp32 [tiles, N]
    divisor_ptr,  # [N]: the magnitude if y was kept, the norm if z was
    gain_ptr,  # fp32 [N], or None: z was kept
    norm_ptr,  # fp32 [N]
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    w_ptr,  # [N, K], any strides
    xa_ptr,  # [M, R], rows apart by stride_xa
    b_ptr,  # [N, R], any strides
    dm_ptr,  # [N]
    tiles,
    M,
    N,
    K,
    stride_wn,
    stride_wk,
    stride_xa,
    stride_bn,
    stride_br,
    R: tl.constexpr,
    SMALL: tl.constexpr,  # gains below it leave too little of z in y
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    partial_ptrs = partial_ptr + n
    for _ in range(tiles):
        total += tl.load(partial_ptrs, mask=n < N, other=0.0)
        partial_ptrs += N
    finish_magnitude(
        total, divisor_ptr, gain_ptr, norm_ptr, dy_ptr, x_ptr, w_ptr, xa_ptr, b_ptr, dm_ptr, start, M, N, K,
        stride_wn, stride_wk, stride_xa, stride_bn, stride_br, R, SMALL, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip


@triton.jit
def finish_magnitude(
    total, divisor_ptr, gain_ptr, norm_ptr, dy_ptr, x_ptr, w_ptr, xa_ptr, b_ptr, dm_ptr, start, M, N, K,
    stride_wn, stride_wk, stride_xa, stride_bn, stride_br, R: tl.constexpr, SMALL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write dm of columns `start` to start + BLOCK_N, of which `total` is Σ dy ⊙ kept."""
    column = tl.arange(0, BLOCK_N)
    n = start + column
    divisor = tl.load(divisor_ptr + n, mask=n < N, other=1.0).to(tl.float32)
    dm = divide(total, divisor)
    if gain_ptr is not None:
        lost = tl.abs(tl.load(gain_ptr + n, mask=n < N, other=1.0)) < SMALL
        if tl.max(lost.to(tl.int32), 0) > 0:
            for i in range(BLOCK_N):
                if tl.sum((lost & (column == i)).to(tl.int32), 0) > 0:
                    total_i = _column_product(
                        dy_ptr, x_ptr, w_ptr, xa_ptr, b_ptr, (start + i).to(tl.int64), M, N, K,
                        stride_wn, stride_wk, stride_xa, stride_bn, stride_br, R, BLOCK_M, BLOCK_K, BLOCK_R,
                    )  # fmt: skip
                    norm = tl.load(norm_ptr + start + i)
                    dm = tl.where(column == i, divide(total_i, norm), dm)
    tl.store(dm_ptr + n, dm.to(dm_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _column_product(
    dy_ptr, x_ptr, w_ptr, xa_ptr, b_ptr, n, M, N, K, stride_wn, stride_wk, stride_xa, stride_bn, stride_br,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ_t dy_tn z_tn of one column n, with z = x Wᵀ + xa Bᵀ computed again."""
    total = 0.0
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        z = tl.zeros([BLOCK_M], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            w = tl.load(w_ptr + n * stride_wn + k.to(tl.int64) * stride_wk, mask=k < K, other=0.0)
            z += tl.sum(x.to(tl.float32) * w.to(tl.float32)[None, :], 1)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            xa = tl.load(
                xa_ptr + m[:, None] * stride_xa + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0
            )
            b = tl.load(b_ptr + n * stride_bn + r * stride_br, mask=r < R, other=0.0)
            z += tl.sum(xa.to(tl.float32) * b.to(tl.float32)[None, :], 1)
        total += tl.sum(tl.load(dy_ptr + m * N + n, mask=m < M, other=0.0).to(tl.float32) * z, 0)
    return total


def scale(dy: Tensor, kept: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(dz [M, N], partial sums of dy ⊙ kept over M [tiles, N])"""
    m, n = dy.shape
    rows = cdiv(m, BLOCK_M)
    dz = torch.empty(m, n, dtype=dy.dtype, device=dy.device)
    partial = torch.empty(rows, n, dtype=torch.float32, device=dy.device)
    tiles = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    launch(_scale_kernel, (rows, cdiv(n, BLOCK_N)), dy, kept, gain, dz, partial, m, n, **tiles, fp_fusion=True)
    return dz, partial


def magnitude_gradient(
    partial: Tensor,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    xa: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    gain: Tensor,
    kept_y: bool,
) -> Tensor:
    (m, n), k, rank = dy.shape, x.shape[1], lora_B.shape[1]
    dm = torch.empty(n, dtype=magnitude.dtype, device=dy.device)
    launch(
        _magnitude_grad_kernel, (cdiv(n, FINISH_N),),
        partial, magnitude.contiguous() if kept_y else norm, gain if kept_y else None, norm,
        dy, x, w, xa, lora_B, dm, partial.shape[0], m, n, k, *w.stride(), xa.stride(0), *lora_B.stride(),
        R=rank, SMALL=torch.finfo(dy.dtype).tiny,
        BLOCK_M=FINISH_M, BLOCK_N=FINISH_N, BLOCK_K=FINISH_K, BLOCK_R=16, fp_fusion=True,
    )  # fmt: skip
    return dm


def weight_norm_sq(weight: Weight) -> Tensor:
    return sums_of_squares(weight, torch.float32 if weight.packed else weight.dtype).sum(dim=0)


def dora_norm(weight: Weight, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return norm_and_gain(weight, weight.dtype, lora_A, lora_B, scaling)[0]


def dora_linear(
    x: Tensor,
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
    xd = drop(x, dropout, seed) if dropout else x
    few = few_tokens.supports(x, dropout)
    if few and norm is not None:
        xa, norm, gain = few_tokens.adapter(x, lora_A, scaling, magnitude, norm.contiguous())
    else:
        xa = few_tokens.adapter(x, lora_A, scaling)[0] if few else project(xd, lora_A.t(), scaling)
        norm, gain = norm_and_gain(weight, x.dtype, lora_A, lora_B, scaling, magnitude, norm)
    if dropout:  # (x - drop(x))Wᵀ + g ⊙ z: elements dropped from the adapter still pass the base
        w = dense(weight, x.dtype)
        z, _ = gemm(xd, w.t(), xa, lora_B.t())
        y, _ = gemm(x - xd, w.t(), bias=bias)
        y.addcmul_(z, gain.to(x.dtype))
    else:
        y, z = product(x, weight, xa, lora_B.t(), bias, gain, keep_z=bias is not None)
    return y, xa, norm, gain, x.new_empty(0) if z is None else z


def dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    z: Tensor,
    norm: Tensor,
    gain: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w = x.contiguous(), dense(weight, x.dtype)
    xd = drop(x, dropout, seed) if dropout else x
    dz, partial = scale(dy, z if y is None else y, gain)
    dxa = project(dz, lora_B, scaling)
    dm = magnitude_gradient(partial, dy, xd, w, xa, lora_B, magnitude, norm, gain, kept_y=y is not None)
    dA, dB = outer(xd, dxa, dz, xa, (lora_A.dtype, lora_B.dtype))
    if not needs_dx:
        return x.new_empty(0), dA, dB, dm
    dx, _ = gemm(dz, w, dxa, lora_A)
    if dropout:  # elements dropped from the adapter's input pass the base alone
        through_base, _ = gemm(dy, w)
        dx = through_base + drop(dx - through_base, dropout, seed)
    return dx, dA, dB, dm


def _scale_case(dtype: str) -> Case:
    dy = meta(4096, 4096, dtype=dtype)
    return Case(
        kernel="dora_scale",
        config=dtype,
        call=lambda: scale(dy, dy, meta(4096)),
        fn=_scale_kernel,
        values=BLOCK_M * BLOCK_N,
        bytes_per_value={"bf16": 6.0, "fp32": 12.0}[dtype] + 4 / BLOCK_M,
        min_load_bits=128,
        min_store_bits=128,
    )


def _magnitude_case(kept_y: bool) -> Case:
    """`magnitude_gradient`, counted without the rare columns of small gain."""
    dy, xa, lora_B = meta(4096, 4096, dtype="bf16"), meta(4096, 64, dtype="bf16"), meta(4096, 64)
    partial, per_row = meta(cdiv(4096, BLOCK_M), 4096), meta(4096)
    return Case(
        kernel="dora_magnitude",
        config="y" if kept_y else "z",
        call=lambda: magnitude_gradient(partial, dy, dy, dy, xa, lora_B, per_row, per_row, per_row, kept_y),
        fn=_magnitude_grad_kernel,
        values=FINISH_N,
        bytes_per_value=4.0,
    )


CASES = [_scale_case("bf16"), _scale_case("fp32"), _magnitude_case(kept_y=True), _magnitude_case(kept_y=False)]
