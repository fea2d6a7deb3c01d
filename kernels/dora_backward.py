"""DoRA's backward: LoRA's backward of dZ = g ⊙ dY, and the magnitude's gradient.

    dZ  = g ⊙ dY                                        [T, out]
    dxa = s·dZ B                                        [T, rank]
    dm  = Σ_t dY ⊙ z / ‖W + sBA‖,   or Σ_t dY ⊙ y / m   [out]

One pass over dY and y (or z) makes dZ, dxa and the partial sums of dm; the rest is LoRA's. Where the gain is so small
that y holds nothing of z (m = 0), dm is computed from x, W and the adapter, inside the kernel that finishes dm: no
synchronisation with the host, and no cost where there is no such column. DoRA, Liu et al. 2024, §4.3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import launch_dropout
from kernels.gemm import gemm
from kernels.low_rank import outer
from kernels.row_norm import divide
from kernels.spec import KernelSpec

BLOCK_M = 32
FINISH_N = 32  # columns of dm a program finishes
FINISH_M = 32  # tile of x and of a row of W in the rare case
FINISH_K = 128


@triton.jit
def _scale_project_kernel(
    dy_ptr,  # [M, N]
    kept_ptr,  # y or z, [M, N]
    gain_ptr,  # fp32 [N]
    b_ptr,  # [N, R], any strides, any float dtype
    dz_ptr,  # [M, N]
    dxa_ptr,  # [M, R]
    partial_ptr,  # fp32 [tiles of M, N]: Σ dy ⊙ kept
    M,
    N,
    stride_bn,
    stride_br,
    scale,  # s
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) == 0  # of the programs that share these rows, the one that writes dz and partial
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None] & (n < N)[None, :]
        offsets = m[:, None] * N + n[None, :]
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(kept_ptr + offsets, mask=inside & first, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + n, mask=n < N, other=0.0)
        dz = (dy * gain[None, :]).to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + offsets, dz, mask=inside & first)
        tl.store(partial_ptr + tile * N + n, tl.sum(dy * kept, 0), mask=(n < N) & first)
        b_ptrs = b_ptr + n[:, None].to(tl.int64) * stride_bn + r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(dz, b.to(dz.dtype), acc, input_precision="ieee")
    dxa = (acc * scale).to(dxa_ptr.dtype.element_ty)
    tl.store(dxa_ptr + m[:, None] * R + r[None, :], dxa, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def _magnitude_grad_kernel(
    partial_ptr,  # fp32 [tiles, N]
    divisor_ptr,  # [N]: the magnitude if y was kept, the norm if z was
    gain_ptr,  # fp32 [N], or None: z was kept
    norm_ptr,  # fp32 [N]
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    w_ptr,  # [N, K], any strides
    xa_ptr,  # [M, R]
    b_ptr,  # [N, R], any strides
    dm_ptr,  # [N]
    tiles,
    M,
    N,
    K,
    stride_wn,
    stride_wk,
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
    column = tl.arange(0, BLOCK_N)
    n = start + column
    total = tl.zeros([BLOCK_N], tl.float32)
    partial_ptrs = partial_ptr + n
    for _ in range(tiles):
        total += tl.load(partial_ptrs, mask=n < N, other=0.0)
        partial_ptrs += N
    divisor = tl.load(divisor_ptr + n, mask=n < N, other=1.0).to(tl.float32)
    dm = divide(total, divisor)
    if gain_ptr is not None:
        lost = tl.abs(tl.load(gain_ptr + n, mask=n < N, other=1.0)) < SMALL
        if tl.max(lost.to(tl.int32), 0) > 0:
            for i in range(BLOCK_N):
                if tl.sum((lost & (column == i)).to(tl.int32), 0) > 0:
                    total_i = _column_product(
                        dy_ptr, x_ptr, w_ptr, xa_ptr, b_ptr, (start + i).to(tl.int64), M, N, K,
                        stride_wn, stride_wk, stride_bn, stride_br, R, BLOCK_M, BLOCK_K, BLOCK_R,
                    )  # fmt: skip
                    norm = tl.load(norm_ptr + start + i)
                    dm = tl.where(column == i, divide(total_i, norm), dm)
    tl.store(dm_ptr + n, dm.to(dm_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _column_product(
    dy_ptr, x_ptr, w_ptr, xa_ptr, b_ptr, n, M, N, K, stride_wn, stride_wk, stride_bn, stride_br,
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
            xa = tl.load(xa_ptr + m[:, None] * R + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
            b = tl.load(b_ptr + n * stride_bn + r * stride_br, mask=r < R, other=0.0)
            z += tl.sum(xa.to(tl.float32) * b.to(tl.float32)[None, :], 1)
        total += tl.sum(tl.load(dy_ptr + m * N + n, mask=m < M, other=0.0).to(tl.float32) * z, 0)
    return total


def _tiles(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Tile sizes, warps and stages. Every choice fits 64 KiB of shared memory and 255 registers (see AOT_SPECS)."""
    if dtype == torch.float32:  # no matrix units
        return {"BLOCK_M": BLOCK_M, "BLOCK_N": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2}
    block_r = min(128, max(16, triton.next_power_of_2(rank)))
    num_stages = 1 if block_r == 128 else 2
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": 64, "BLOCK_R": block_r, "num_warps": 4, "num_stages": num_stages}


def _scale_project(
    dy: Tensor, kept: Tensor, gain: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz [M, N], dxa [M, R], partial sums of dy ⊙ kept over M [tiles, N])"""
    (m, n), rank = dy.shape, lora_B.shape[1]
    tiles = _tiles(dy.dtype, rank)
    rows = triton.cdiv(m, BLOCK_M)
    dz = torch.empty(m, n, dtype=dy.dtype, device=dy.device)
    dxa = torch.empty(m, rank, dtype=dy.dtype, device=dy.device)
    partial = torch.empty(rows, n, dtype=torch.float32, device=dy.device)
    if m:
        with torch.cuda.device_of(dy):
            _scale_project_kernel[(rows, triton.cdiv(rank, tiles["BLOCK_R"]))](
                dy, kept, gain, lora_B, dz, dxa, partial, m, n, *lora_B.stride(), scaling,
                R=rank, **tiles, enable_fp_fusion=True,
            )  # fmt: skip
    return dz, dxa, partial


def _magnitude_grad(
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
    with torch.cuda.device_of(dy):
        _magnitude_grad_kernel[(triton.cdiv(n, FINISH_N),)](
            partial, magnitude.contiguous() if kept_y else norm, gain if kept_y else None, norm,
            dy, x, w, xa, lora_B, dm, partial.shape[0], m, n, k, *w.stride(), *lora_B.stride(),
            R=rank, SMALL=torch.finfo(dy.dtype).tiny,
            BLOCK_M=FINISH_M, BLOCK_N=FINISH_N, BLOCK_K=FINISH_K, BLOCK_R=16, enable_fp_fusion=True,
        )  # fmt: skip
    return dm


def dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    z: Tensor,
    norm: Tensor,
    gain: Tensor,
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.dora_linear_backward` by the kernels; dy and x are contiguous."""
    xd = launch_dropout(x, p, seed) if p else x
    dz, dxa, partial = _scale_project(dy, z if y is None else y, gain, lora_B, scaling)
    dm = _magnitude_grad(partial, dy, xd, w, xa, lora_B, magnitude, norm, gain, kept_y=y is not None)
    dA, dB = outer(xd, dxa, dz, xa, (lora_A.dtype, lora_B.dtype))
    if not needs_dx:
        return x.new_empty(0), dA, dB, dm
    dx, _ = gemm(dz, w, dxa, lora_A)
    if p:  # what is dropped from the adapter's input passes the base alone
        through_base, _ = gemm(dy, w)
        dx = through_base + launch_dropout(dx - through_base, p, seed)
    return dx, dA, dB, dm


def _spec(rank: int, dtype: str = "bf16") -> KernelSpec:
    """The spec of what `_scale_project` does for a rank."""
    tiles = _tiles({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], rank)
    num_warps, num_stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    signature = {f"{operand}_ptr": f"*{dtype}" for operand in ("dy", "kept", "dz", "dxa")}
    signature |= {f"{operand}_ptr": "*fp32" for operand in ("gain", "b", "partial")}
    return KernelSpec(
        kernel="dora_scale_project",
        config=f"r{rank}-{dtype}",
        fn=_scale_project_kernel,
        signature=signature | {"M": "i32", "N": "i32", "stride_bn": "i32", "scale": "fp32"},
        constexprs={"stride_br": 1, "R": rank, **tiles},
        values=tiles["BLOCK_M"] * tiles["BLOCK_N"],
        bytes_per_value={"bf16": 6.0, "fp32": 12.0}[dtype] + 4 / BLOCK_M,
        flops_per_value=2 * tiles["BLOCK_R"],
        num_warps=num_warps,
        num_stages=num_stages,
        fp_fusion=True,
        divisible=("N", "stride_bn"),
        loop=True,
        min_load_bits=128,
        min_store_bits=128,
        mma=dtype != "fp32",
    )


def _finish_spec(kept_y: bool) -> KernelSpec:
    """The spec of what `_magnitude_grad` does, the rare case left out."""
    signature = {f"{operand}_ptr": "*bf16" for operand in ("dy", "x", "w", "xa")}
    signature |= {f"{operand}_ptr": "*fp32" for operand in ("partial", "divisor", "norm", "b", "dm")}
    signature |= dict.fromkeys(("tiles", "M", "N", "K", "stride_wn", "stride_bn"), "i32")
    tiles = {"BLOCK_M": FINISH_M, "BLOCK_N": FINISH_N, "BLOCK_K": FINISH_K, "BLOCK_R": 16}
    return KernelSpec(
        kernel="dora_magnitude",
        config="y" if kept_y else "z",
        fn=_magnitude_grad_kernel,
        signature=signature | ({"gain_ptr": "*fp32"} if kept_y else {}),
        constexprs={"stride_wk": 1, "stride_br": 1, "R": 64, "SMALL": 1e-38, **tiles}
        | ({} if kept_y else {"gain_ptr": None}),
        values=FINISH_N,
        bytes_per_value=4.0,
        num_warps=4,
        num_stages=3,
        fp_fusion=True,
        divisible=("N", "K", "stride_wn", "stride_bn"),
    )


AOT_SPECS = [_spec(16), _spec(64), _spec(512), _spec(64, "fp32"), _finish_spec(True), _finish_spec(False)]
