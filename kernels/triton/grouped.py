"""Products of rows that are sorted by expert, each with its expert's weight: all experts in one launch.

    z = x W_e + drop(S V_e)                x [S, K], W [E, K, N], S [S, R], V [E, R, N]
    y = gain_e ⊙ z + D + bias_e            gain, bias [E, N], D [S, N]; every factor and term after x W_e may be absent

This is gemm.py with a weight for each expert. A program computes a tile of rows of one expert, which it finds from
`ends` on the device: the host does not know how many rows an expert has. ⌈S / BLOCK_M⌉ + E tiles are enough, however
the rows are spread, also for the rows after the last expert's, which belong to nobody and become 0.

W may be that of consecutive experts alone (experts_weights.py). Such a launch writes only their rows, and with the last
expert the rows that belong to nobody. It has as many tiles as if they had all rows; the others end at once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import threshold
from kernels.triton.case import DTYPES, Case, meta
from kernels.triton.dropout import keep
from kernels.triton.gemm import add_low_rank, tile_of
from kernels.triton.launch import cdiv, launch, next_power_of_2

# Where torch has a kernel for grouped_mm, and so its product is the library's: bf16, major compute capability 9 and 10
# (CUTLASS). Elsewhere it loops over experts and the host waits for `ends`. That it is faster than the kernel here was
# not measured: gemm.py's LIBRARY_FROM has what is known of one product. Change it where `python -m kernels.bench
# experts_lora` says otherwise. Its rows begin with those of its first expert, so it takes all experts or none.
LIBRARY_ON = (9, 10)
ZERO_ROWS, ZERO_COLUMNS = 64, 128


@triton.jit
def rows_of_tile(ends_ptr, tile, M, begin, experts, total, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row of the expert, first row of the tile, row behind the expert's last) of a tile of rows.

    The launch is for `experts` of all `total` ones; the first of them, which is 0 here, is expert `begin` of all. The
    one after its last stands for nobody, who has rows if that was the last of all. Tiles after all rows have no row:
    the last two numbers are 0.
    """
    i = tl.arange(0, EXPERTS)  # at least experts + 1
    ends_ptr += begin
    of_nobody = tl.where(begin + experts == total, M, 0)
    ends = tl.minimum(tl.load(ends_ptr + i, mask=i < experts, other=of_nobody), M)
    starts = tl.minimum(tl.load(ends_ptr + i - 1, mask=(begin + i > 0) & (i <= experts), other=0), M)
    starts = tl.where(i > experts, M, starts)
    tiles = (tl.maximum(ends - starts, 0) + BLOCK_M - 1) // BLOCK_M
    behind = tl.cumsum(tiles, 0)
    expert = tl.sum((behind <= tile).to(tl.int32), 0)
    this = i == expert
    start = tl.sum(tl.where(this, starts, 0), 0)
    end = tl.sum(tl.where(this, ends, 0), 0)
    row = start + (tile - tl.sum(tl.where(this, behind - tiles, 0), 0)) * BLOCK_M
    return expert, start, tl.where(expert > experts, 0, row), end


@triton.jit(do_not_specialize=["begin"])  # or parts would be compiled apart
def _grouped_kernel(
    x_ptr,  # [M, K], or None: x W is known, only the epilogue is left
    w_ptr,  # [experts, K, N], any strides, in x's dtype, or None
    xw_ptr,  # [M, N]: x W; may be y; or None
    s_ptr,  # [M, R] in x's dtype, or None
    v_ptr,  # [E, R, N], any strides, any float dtype
    gain_ptr,  # fp32 [E, N], or None
    added_ptr,  # [M, N], or None; may be y
    bias_ptr,  # [E, N], or None
    seed_ptr,  # i64 [], or None: no dropout
    ends_ptr,  # i32 [E]
    y_ptr,  # [M, N]
    z_ptr,  # [M, N], or None: z is not kept
    M,
    N,
    K,
    begin,  # the first expert of this launch
    experts,  # of this launch
    total,  # E
    tiles,  # of rows
    stride_we,
    stride_wk,
    stride_wn,
    stride_ve,
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
    EXPERTS: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, first, row, end = rows_of_tile(ends_ptr, pid_m, M, begin, experts, total, BLOCK_M, EXPERTS)
    m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_expert = expert < experts
    known = tl.where(has_expert, end, 0)  # rows from here on are not read
    own = tl.minimum(expert, experts - 1).to(tl.int64)  # among those of this launch
    e = begin + own
    places = m[:, None] * N + n[None, :]
    read = (m < known)[:, None] & (n < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if xw_ptr is not None:
        acc += tl.load(xw_ptr + places, mask=read, other=0.0).to(tl.float32)
    if x_ptr is not None:
        k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + m[:, None] * K + k[None, :]
        w_ptrs = w_ptr + own * stride_we + k[:, None].to(tl.int64) * stride_wk + n[None, :] * stride_wn
        for k0 in range(0, tl.where(row < known, K, 0), BLOCK_K):
            x = tl.load(x_ptrs, mask=(m < known)[:, None] & (k < K - k0)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k < K - k0)[:, None] & (n < N)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
    if s_ptr is not None:
        v_ptr += e * stride_ve
        if seed_ptr is None:
            acc = add_low_rank(acc, s_ptr, v_ptr, m, n, known, N, R, stride_vr, stride_vn, R, BLOCK_R)
        else:
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            product = add_low_rank(product, s_ptr, v_ptr, m, n, known, N, R, stride_vr, stride_vn, R, BLOCK_R)
            kept = keep(tl.load(seed_ptr) + e, (m - first)[:, None], n[None, :], THRESHOLD)
            acc += tl.where(kept, product * scale, 0.0)
    inside = (m < end)[:, None] & (n < N)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + places, tl.where(has_expert, acc, 0.0).to(z_ptr.dtype.element_ty), mask=inside)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + e * N + n, mask=n < N, other=0.0)[None, :]
    if added_ptr is not None:
        acc += tl.load(added_ptr + places, mask=read, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + e * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + places, tl.where(has_expert, acc, 0.0).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _zero_rows_kernel(
    y_ptr,  # [M, N]
    ends_ptr,  # i32 [E]
    M,
    N,
    experts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(ends_ptr + experts - 1)
    of_nobody = (m >= first) & (m < M)
    zero = tl.zeros([BLOCK_M, BLOCK_N], y_ptr.dtype.element_ty)
    for n0 in range(0, tl.where(tl.max(m, 0) >= first, N, 0), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        tl.store(y_ptr + m[:, None] * N + n[None, :], zero, mask=of_nobody[:, None] & (n < N)[None, :])


def tiles_of_rows(experts: int, rows: int, block: int) -> tuple[int, dict[str, int]]:
    """(tiles of `block` rows that are enough, the size that `rows_of_tile` looks at experts in)"""
    return min(rows, cdiv(rows, block) + experts), {"EXPERTS": next_power_of_2(experts + 1)}


def _tiles(dtype: torch.dtype, rank: int, rows: int, experts: int, epilogue: bool) -> dict[str, int]:
    """Tile sizes, warps and stages; tiles are as high as an expert has rows on average. See CASES for what fits."""
    block_r, of_one = min(64, max(16, next_power_of_2(rank))), cdiv(rows, experts)
    if dtype == torch.float32:  # no matrix units
        m, n, k, block_r, warps, stages = 64 if of_one > 16 else 16, 64, 16, 16, 4, 2
    elif of_one <= 16:
        m, n, k, warps, stages = 16, 64 if epilogue else 128, 64, 4, 1 if epilogue else 3
    elif epilogue:
        m, n, k, warps, stages = 64, 128, 64, 4, 1
    elif of_one <= 64:
        m, n, k, warps, stages = 64, 128, 64, 4, 3
    else:
        m, n, k, warps, stages = 128, 128, 64, 8, 3
    return {
        **{"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_R": block_r, "GROUP_M": 8},
        **{"num_warps": warps, "num_stages": stages},
    }


@functools.cache
def _has_library(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in LIBRARY_ON


def use_library(x: Tensor, w: Tensor) -> bool:
    """True if torch's grouped_mm computes the product of x [M, K] with w [E, K, N]: its rows must begin at 16 bytes."""
    if x.dtype != torch.bfloat16 or not _has_library(x.device) or x.shape[1] % 8 or w.shape[2] % 8:
        return False
    return any(w.stride(i) == 1 and w.stride(3 - i) % 8 == 0 for i in (1, 2)) and w.stride(0) % 8 == 0


def grouped(
    x: Tensor,
    ends: Tensor,
    w: Tensor,
    s: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    added: Tensor | None = None,
    keep_z: bool = False,
    p: float = 0.0,
    seed: Tensor | None = None,
    begin: int = 0,
    into: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, z or None): z = x W_e + drop(s V_e), y = gain_e ⊙ z + added + bias_e; 0 in rows that belong to nobody.

    x [M, K], s [M, R] and added [M, N] are contiguous; w [E, K, N] and v [E, R, N] may have any strides. If w
    [experts, K, N] is that of the experts from `begin` on, only their rows are written, `into` the result for those
    before.
    """
    m, n = x.shape[0], w.shape[2]
    if m > 0 and len(w) == len(ends) and use_library(x, w):
        y = torch.nn.functional.grouped_mm(x, w, offs=ends)
        z = torch.empty(m, n, dtype=x.dtype, device=x.device) if keep_z else None
        if s is None and gain is None and added is None and bias is None and not keep_z:
            zero_rows(y, ends)
        else:
            _launch(None, None, y, s, v, gain, added, bias, ends, y, z, p, seed)
        return y, z
    if into is None:
        y, z = (torch.empty(m, n, dtype=x.dtype, device=x.device) if wanted else None for wanted in (True, keep_z))
    else:
        y, z = into
    _launch(x, w, None, s, v, gain, added, bias, ends, y, z, p, seed, begin)
    return y, z


def zero_rows(y: Tensor, ends: Tensor) -> None:
    """Write 0 to the rows of y [M, N] that belong to nobody."""
    args = (y, ends, *y.shape, len(ends))
    launch(_zero_rows_kernel, (cdiv(len(y), ZERO_ROWS),), *args, ZERO_ROWS, ZERO_COLUMNS, fp_fusion=False)


def _launch(
    x: Tensor | None,
    w: Tensor | None,
    xw: Tensor | None,
    s: Tensor | None,
    v: Tensor | None,
    gain: Tensor | None,
    added: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
    y: Tensor,
    z: Tensor | None,
    p: float,
    seed: Tensor | None,
    begin: int = 0,
) -> None:
    (m, n), rank, total = y.shape, 0 if s is None else s.shape[1], len(ends)
    experts = total if w is None else len(w)
    tiles = _tiles(y.dtype, rank, m, total, x is None)
    of_rows, block_e = tiles_of_rows(experts, m, tiles["BLOCK_M"])
    launch(
        _grouped_kernel, (of_rows * cdiv(n, tiles["BLOCK_N"]),),
        x, w, xw, s, v, gain, added, None if bias is None else bias.contiguous(), seed if p else None, ends, y, z,
        m, n, 0 if x is None else x.shape[1], begin, experts, total, of_rows,
        *((0, 0, 0) if w is None else w.stride()), *((0, 0, 0) if s is None else v.stride()),
        1 / (1 - p), R=rank, THRESHOLD=threshold(p), **tiles, **block_e, fp_fusion=True,
    )  # fmt: skip


def _case(
    config: str,
    rank: int,
    dtype: str = "bf16",
    backward: bool = False,
    rows: int = 32768,
    known: bool = False,
    part: int = 128,
) -> Case:
    """128 experts 2048 → 768 in DoRA's forward, which keeps z, or in LoRA's backward with dropout; x W may be known.
    `part` of the experts at a time."""
    columns, out = (768, 2048) if backward else (2048, 768)
    x, y, w = meta(rows, columns, dtype=dtype), meta(rows, out, dtype=dtype), meta(part, 768, 2048, dtype=dtype)
    product = (None, None, y) if known else (x, w if backward else w.mT, None)
    s, v = meta(rows, rank, dtype=dtype), meta(128, rank, 2048) if backward else meta(128, 768, rank).mT
    scales = (None, None, None) if backward else (meta(128, 768), None, meta(128, 768, dtype=dtype))
    rest = (None, 0.1, meta(dtype=torch.int64)) if backward else (y, 0.0, None)
    size = DTYPES[dtype].itemsize
    return Case(
        kernel="grouped_epilogue" if known else "grouped",
        config=config,
        call=lambda: _launch(*product, s, v, *scales, meta(128, dtype=torch.int32), y, *rest),
        fn=_grouped_kernel,
        # a value is one multiply-add of the main loop; of the epilogue it is one element of y
        values=lambda a: a.BLOCK_M * a.BLOCK_N * (1 if known else a.BLOCK_K),
        bytes_per_value=2 * size if known else size * (1 / 768 + 1 / 2048 + 128 / rows),
        flops_per_value=2 * rank if known else 2,
        loop=not known,
        mma=dtype != "fp32",
    )


CASES = [
    *[_case(f"forward-r{rank}-bf16", rank) for rank in (16, 64, 512)],
    *[_case(f"backward-r{rank}-bf16", rank, backward=True) for rank in (16, 64)],
    *[_case(f"forward-{rows // 128}-rows-r16-bf16", 16, rows=rows) for rows in (128, 8192)],
    *[_case(f"forward-part-of-{part}-r16-bf16", 16, part=part) for part in (1, 32)],
    _case("forward-r64-fp16", 64, "fp16"),
    _case("forward-r16-fp32", 16, "fp32"),
    _case("forward-r64-bf16", 64, known=True),
    _case("backward-r64-bf16", 64, backward=True, known=True),
    Case(
        kernel="grouped_zero",
        config="bf16",
        call=lambda: zero_rows(meta(32768, 2048, dtype="bf16"), meta(128, dtype=torch.int32)),
        fn=_zero_rows_kernel,
        values=ZERO_ROWS * ZERO_COLUMNS,
        bytes_per_value=2.0,
        loop=True,
        min_store_bits=128,
    ),
]
