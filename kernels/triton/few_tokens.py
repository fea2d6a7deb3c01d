"""The part of an adapter that comes before the product, of few tokens without dropout, in one launch.

    xa = s·x Aᵀ                          [M, R] in x's dtype
    gain = m / ‖W + sBA‖                 [N], with DoRA where the norm is known

As in `project` of low_rank.py, x Aᵀ is bound by reading. But few tokens make few tiles, so matrix units, which a tile
must fill, would leave most of a GPU idle. Here a program takes one row of A and up to four tokens, and its warps split
the columns: the sum has one order, two runs give the same bits. Other programs compute the gain.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.case import Case, meta
from kernels.triton.launch import cdiv, launch, next_power_of_2

MAX_TOKENS = 64  # each row of A is read again for every four tokens, from the L2 cache
MAX_TOKENS_OF_ONE = 4  # tokens of a program: 32 registers of sums
BLOCK_K = 1024  # eight columns a thread
BLOCK_N = 1024  # gains of a program


@triton.jit
def _adapter_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K], any strides, any float dtype
    xa_ptr,  # [M, R] in x's dtype
    magnitude_ptr,  # [N], any stride and float dtype, or None: no DoRA
    norm_ptr,  # fp32 [N]
    norm_copy_ptr,  # fp32 [N]
    gain_ptr,  # fp32 [N]
    M,
    N,
    K,
    R,
    stride_ar,
    stride_ak,
    stride_m,
    scale,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    if magnitude_ptr is None:
        _row_of_a(x_ptr, a_ptr, xa_ptr, pid, M, K, R, stride_ar, stride_ak, scale, TOKENS, BLOCK_K)
    else:
        gains = tl.cdiv(N, BLOCK_N)
        if pid < gains:
            _gain(magnitude_ptr, norm_ptr, norm_copy_ptr, gain_ptr, pid, N, stride_m, BLOCK_N)
        else:
            _row_of_a(x_ptr, a_ptr, xa_ptr, pid - gains, M, K, R, stride_ar, stride_ak, scale, TOKENS, BLOCK_K)


@triton.jit
def _row_of_a(
    x_ptr, a_ptr, xa_ptr, pid, M, K, R, stride_ar, stride_ak, scale, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr
):
    r = pid % R
    m = pid // R * TOKENS + tl.arange(0, TOKENS)
    acc = tl.zeros([TOKENS, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + r.to(tl.int64) * stride_ar + k.to(tl.int64) * stride_ak
        a = tl.load(a_ptrs, mask=k < K, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
        x = tl.load(x_ptrs, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        acc += x * a[None, :]
    xa = tl.sum(acc, axis=1) * scale
    tl.store(xa_ptr + m.to(tl.int64) * R + r, xa.to(xa_ptr.dtype.element_ty), mask=m < M)


@triton.jit
def _gain(magnitude_ptr, norm_ptr, norm_copy_ptr, gain_ptr, pid, N, stride_m, BLOCK_N: tl.constexpr):
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    norm = tl.load(norm_ptr + n, mask=n < N, other=0.0)
    magnitude = tl.load(magnitude_ptr + n.to(tl.int64) * stride_m, mask=n < N, other=0.0).to(tl.float32)
    gain = tl.where(norm == 0.0, 0.0, tl.math.div_rn(magnitude, tl.where(norm == 0.0, 1.0, norm)))
    tl.store(norm_copy_ptr + n, norm, mask=n < N)
    tl.store(gain_ptr + n, gain, mask=n < N)


def supports(x: Tensor, dropout: float) -> bool:
    """True if `adapter` takes x [M, K], and is taken to be the fastest way."""
    return 0 < x.shape[0] <= MAX_TOKENS and not dropout


def adapter(
    x: Tensor, lora_A: Tensor, scaling: float, magnitude: Tensor | None = None, norm: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(xa, a copy of norm, gain), the last two None without a magnitude [N]; x [M, K] contiguous, M ≤ 64.

    lora_A [R, K] and magnitude may have any strides, norm fp32 [N] is contiguous.
    """
    (m, k), rank, device = x.shape, lora_A.shape[0], x.device
    n, tokens = 0 if magnitude is None else magnitude.shape[0], min(MAX_TOKENS_OF_ONE, next_power_of_2(m))
    xa = torch.empty(m, rank, dtype=x.dtype, device=device)
    copy = gain = None
    if magnitude is not None:
        copy, gain = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
    launch(
        _adapter_kernel, (cdiv(m, tokens) * rank + cdiv(n, BLOCK_N),),
        x, lora_A, xa, magnitude, norm, copy, gain, m, n, k, rank,
        *lora_A.stride(), 0 if magnitude is None else magnitude.stride(0), scaling,
        TOKENS=tokens, BLOCK_K=BLOCK_K, BLOCK_N=BLOCK_N, num_warps=4, fp_fusion=True,
    )  # fmt: skip
    return xa, copy, gain


def _case(tokens: int, rank: int, dtype: str = "bf16", dora: bool = False) -> Case:
    x, lora_A, per_row = meta(tokens, 4096, dtype=dtype), meta(rank, 4096), meta(4096) if dora else None
    return Case(
        kernel="few_tokens_adapter",
        config=f"m{tokens}-r{rank}-{dtype}" + "-dora" * dora,
        call=lambda: adapter(x, lora_A, 2.0, per_row, per_row),
        fn=_adapter_kernel,
        values=lambda a: a.TOKENS * BLOCK_K,
        bytes_per_value=4 / min(tokens, MAX_TOKENS_OF_ONE),  # A; x stays in a cache
        loop=True,
        max_instr=7.2 if tokens == 1 else 4.5,
        max_registers=128,
        min_load_bits=128,
    )


CASES = [_case(1, 16), _case(1, 16, dora=True), _case(64, 64, dora=True), _case(4, 16, "fp32")]
