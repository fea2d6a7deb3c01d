"""The product of an adapted linear, forward and backward, with all that surrounds it in its epilogue.

    z = (C +) x W + drop(S V)              x [M, K], W [K, N], S [M, R], V [R, N], C [M, N] from before
    y = gain ⊙ z + bias                    every factor and term after x W may be absent

Forward is W = W_baseᵀ, S = s·drop(x)Aᵀ, V = Bᵀ; backward is x = dY, W = W_base, S = s·dY B, V = A. The low-rank product
is added to the accumulator after the main loop, so that y is written once and the main loop is a plain GEMM's:
computing S in it as well costs more registers than it saves traffic (freesolo-chalk 0.5.7 measured 0.24-0.87×).

W and V may have any strides, S any between its rows. Not materialised: S V, the dropout mask.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import threshold
from kernels.triton.case import DTYPES, Case, meta
from kernels.triton.dropout import keep
from kernels.triton.launch import cdiv, launch, next_power_of_2

# From this many tokens on, the library's GEMM and our epilogue after it take less time than our kernel alone. Keyed by
# major compute capability; others never call the library. The epilogue costs one more read and write of y.
#   9   measured on an H200: from 512 tokens on the library won at every shape but one
#   8   measured on an A40: a Triton GEMM took 0.96-1.08 of the library's time
#   10  an estimate, not measured: Triton's GEMM does not use the bulk copies of these GPUs either
#   12  not measured
# Change it where `python -m kernels.bench gemm` says otherwise.
LIBRARY_FROM: dict[int, float] = {8: float("inf"), 9: 512, 10: 2048, 12: float("inf")}


@triton.jit
def gemm_kernel(
    x_ptr,  # [M, K], or None: x W is known, only the epilogue is left
    w_ptr,  # [K, N], any strides, in x's dtype, or None
    xw_ptr,  # [splits, M, N], any float dtype: terms that are added to x W, or all of it; may be y; or None
    s_ptr,  # [M, R] in x's dtype, rows apart by stride_sm, or None
    v_ptr,  # [R, N], any strides, any float dtype
    gain_ptr,  # fp32 [N], or None
    bias_ptr,  # [N], or None
    seed_ptr,  # i64 [], or None: no dropout
    y_ptr,  # [M, N]
    z_ptr,  # [M, N], or None: z is not kept
    M,
    N,
    K,
    splits,
    stride_wk,
    stride_wn,
    stride_sm,
    stride_vr,
    stride_vn,
    scale,  # 1 / (1 - p), of what dropout keeps
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if xw_ptr is not None:
        xw_ptrs = xw_ptr + m[:, None] * N + n[None, :]
        for _ in range(splits):
            acc += tl.load(xw_ptrs, mask=inside, other=0.0).to(tl.float32)
            xw_ptrs += M * N
    if x_ptr is not None:
        k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + m[:, None] * K + k[None, :]
        w_ptrs = w_ptr + k[:, None].to(tl.int64) * stride_wk + n[None, :] * stride_wn
        for k0 in range(0, K, BLOCK_K):
            x = tl.load(x_ptrs, mask=(m < M)[:, None] & (k < K - k0)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k < K - k0)[:, None] & (n < N)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
    if s_ptr is not None:
        if seed_ptr is None:
            acc = add_low_rank(acc, s_ptr, v_ptr, m, n, M, N, stride_sm, stride_vr, stride_vn, R, BLOCK_R)
        else:
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            product = add_low_rank(product, s_ptr, v_ptr, m, n, M, N, stride_sm, stride_vr, stride_vn, R, BLOCK_R)
            acc += tl.where(keep(tl.load(seed_ptr), m[:, None], n[None, :], THRESHOLD), product * scale, 0.0)
    if z_ptr is not None:
        tl.store(z_ptr + m[:, None] * N + n[None, :], acc.to(z_ptr.dtype.element_ty), mask=inside)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + n, mask=n < N, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a program's tile: GROUP_M rows of tiles run together and share their columns of W in cache."""
    group = pid // (GROUP_M * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def add_low_rank(
    acc, s_ptr, v_ptr, m, n, M, N, stride_sm, stride_vr, stride_vn, R: tl.constexpr, BLOCK_R: tl.constexpr
):
    """acc + S V, for rows m and columns n"""
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):  # few trips: stages would only cost shared memory
        r = r0 + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + m[:, None] * stride_sm + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        v_ptrs = v_ptr + r[:, None].to(tl.int64) * stride_vr + n[None, :] * stride_vn
        v = tl.load(v_ptrs, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(s, v.to(s_ptr.dtype.element_ty), acc, input_precision="ieee")
    return acc


def _tiles(dtype: torch.dtype, rank: int, tokens: int, epilogue: bool) -> dict[str, int]:
    """Tile sizes, warps and stages. Every choice fits 99 KiB of shared memory and 255 registers (see CASES)."""
    block_r = min(64, max(16, next_power_of_2(rank)))
    if epilogue and tokens <= 16:  # decoding: narrow tiles, or there are too few of them for a GPU
        m, n, k, block_r, warps, stages = 16, 64, 16, 16, 4, 1
    elif epilogue and dtype == torch.float32:  # no matrix units
        m, n, k, block_r, warps, stages = 64, 64, 16, 16, 4, 2
    elif epilogue:
        m, n, k, warps, stages = 64, 128, 64, 4, 1
    else:  # of fp32 only in the interpreter
        m, n, k, warps, stages = 128, 128, 64, 8, 3
    return {
        **{"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_R": block_r, "GROUP_M": 8},
        **{"num_warps": warps, "num_stages": stages},
    }


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def use_library(x: Tensor) -> bool:
    """True if the library computes x's GEMM. In the interpreter, which has no speed to choose by, it never does."""
    if not x.is_cuda:
        return False
    return x.dtype == torch.float32 or x.shape[0] >= LIBRARY_FROM.get(_major(x.device), float("inf"))


def gemm(
    x: Tensor,
    w: Tensor | None,
    s: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    keep_z: bool = False,
    p: float = 0.0,
    seed: Tensor | None = None,
    xw: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, z or None): y = gain ⊙ (x w + drop(s v)) + bias.

    x [M, K] is contiguous, s [M, R] in its rows, w [K, N] and v [R, N] need not be. If x w is known, `xw`
    [splits, M, N] takes the place of w: its terms, contiguous, whose sum over the splits is x w.
    """
    epilogue = xw is not None or use_library(x)
    if epilogue and xw is None:
        if s is None and gain is None and not keep_z:
            return (torch.mm(x, w) if bias is None else torch.addmm(bias.to(x.dtype), x, w)), None
        y = torch.mm(x, w)
        xw = y.unsqueeze(0)  # which y then overwrites
    else:
        y = torch.empty(x.shape[0], w.shape[1] if xw is None else xw.shape[2], dtype=x.dtype, device=x.device)
    z = torch.empty(y.shape, dtype=x.dtype, device=x.device) if keep_z else None
    _launch(None if epilogue else x, None if epilogue else w, xw, s, v, gain, bias, y, z, p, seed)
    return y, z


def add_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """y += x w, in place; y [M, N] and x [M, K] contiguous, w [K, N] of any strides. The sum is rounded once."""
    if use_library(x):
        y.addmm_(x, w)
    else:
        _launch(x, w, y.unsqueeze(0), None, None, None, None, y, None)


def _launch(
    x: Tensor | None,
    w: Tensor | None,
    xw: Tensor | None,
    s: Tensor | None,
    v: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    (m, n), rank = y.shape, 0 if s is None else s.shape[1]
    tiles = _tiles(y.dtype, rank, m, x is None)
    launch(
        gemm_kernel, (cdiv(m, tiles["BLOCK_M"]) * cdiv(n, tiles["BLOCK_N"]),),
        x, w, xw, s, v, gain, bias, seed if p else None, y, z,
        m, n, 0 if x is None else x.shape[1], 0 if xw is None else xw.shape[0],
        *((0, 0) if w is None else w.stride()), *((0, 0, 0) if s is None else (s.stride(0), *v.stride())),
        1 / (1 - p), R=rank, THRESHOLD=threshold(p), **tiles, fp_fusion=True,
    )  # fmt: skip


def _case(
    config: str, rank: int, dtype: str = "bf16", backward: bool = False, xw: str | None = None, tokens: int = 4096
) -> Case:
    """`gemm` in DoRA's forward, which keeps z, or in LoRA's backward with dropout.

    Args:
        xw: dtype of x w where it is known and only the epilogue is left; None where it is not.
        tokens: rows of x. Up to 64 the terms of x w are those of nf4_small_batch.py.
    """
    x, w = meta(tokens, 4096, dtype=dtype), meta(4096, 4096, dtype=dtype)
    splits = 16 if tokens <= 64 else 1
    product = {"w": w if backward else w.t()} if xw is None else {"w": None, "xw": meta(splits, tokens, 4096, dtype=xw)}
    s, v = meta(tokens, rank, dtype=dtype), meta(rank, 4096) if backward else meta(4096, rank).t()
    if backward:
        others = {"p": 0.1, "seed": meta(dtype=torch.int64)}
    else:
        others = {"bias": meta(4096, dtype=dtype), "gain": meta(4096), "keep_z": True}
    return Case(
        kernel="gemm_epilogue" if xw else "gemm",
        config=config,
        call=lambda: gemm(x, s=s, v=v, **product, **others),
        fn=gemm_kernel,
        # a value is one multiply-add of the main loop; of the epilogue it is one element of y
        values=lambda a: a.BLOCK_M * a.BLOCK_N * (1 if xw else a.BLOCK_K),
        # of a product of 4096 tokens and features in and out, if its tiles read from the L2 cache when they read again
        bytes_per_value=(DTYPES[xw].itemsize + DTYPES[dtype].itemsize) if xw else 3 * 2 / 4096,
        flops_per_value=2 * rank if xw else 2,
        loop=not xw,
        mma=dtype != "fp32",
    )


# fp32's main loop is not among them: on a GPU it is always the library's.
CASES = [
    *[_case(f"forward-r{rank}-bf16", rank) for rank in (16, 64, 512)],
    *[_case(f"backward-r{rank}-bf16", rank, backward=True) for rank in (16, 64, 512)],
    *[_case(f"{way}-r64-fp16", 64, "fp16", backward=way == "backward") for way in ("forward", "backward")],
    _case("forward-r64-bf16", 64, xw="bf16"),
    _case("backward-r64-bf16", 64, backward=True, xw="bf16"),
    _case("backward-r16-fp32", 16, "fp32", backward=True, xw="fp32"),
    *[_case(f"few-{tokens}-r64-bf16", 64, xw="fp32", tokens=tokens) for tokens in (16, 64)],
    _case("few-16-r16-fp32", 16, "fp32", xw="fp32", tokens=16),
]
