"""The readable torch twin of every op: its definition, the oracle of its tests and what runs on a CPU.

Each twin takes and returns what the op of the same name does (see that op's file for shapes and formats). On a CPU in
bf16, and where weights are packed, kernels of its own do some of the work (kernels/cpu/).
"""

import torch
from torch import Tensor

from kernels import cpu
from kernels.codebook import NESTED_BLOCKSIZE, bin_table, dynamic_codes, dynamic_map, level_pairs
from kernels.dropout import dropout

# ---------------------------------------------------------------------------------------- 4 bits


_CHUNK = 2**18  # values, whole blocks of any size: what is computed between w and its codes stays in a CPU's cache


def quantize_4bit(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    x = w.reshape(-1)
    n, full = x.numel(), x.numel() // blocksize * blocksize
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=w.device)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    # bitsandbytes multiplies full blocks by 1/absmax but divides the partial last one, and there alone stores
    # 1e-38 for an all-zero block. Codes on a decision bound depend on it, so we do the same.
    whole = x[:full]
    if cpu.takes(whole, dtype=torch.float32) or cpu.takes(whole):
        cpu.packing.quantize(whole, packed[: full // 2], absmax[: full // blocksize], blocksize, quant_type)
    else:
        for start in range(0, full, _CHUNK):
            blocks = whole[start : start + _CHUNK].float().view(-1, blocksize)
            largest = absmax[start // blocksize : start // blocksize + len(blocks)]
            torch.amax(blocks.abs(), dim=1, out=largest)
            scaled = blocks * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)
            packed[start // 2 : (start + blocks.numel()) // 2] = _packed_codes(scaled.view(-1), quant_type)
    if full < n:
        tail = x[full:].float()
        absmax[-1] = tail.abs().amax().clamp(min=1e-38)
        scaled = torch.nn.functional.pad(tail / absmax[-1], (0, tail.numel() % 2))
        packed[full // 2 :] = _packed_codes(scaled, quant_type)
    return packed, absmax


def _packed_codes(scaled: Tensor, quant_type: str) -> Tensor:
    """Codes of the levels nearest to fp32 values in [-1, 1] or NaN, which gets the last; two in a byte; overwrites."""
    table, bounds, scale = bin_table(quant_type, scaled.device)
    scaled.nan_to_num_(nan=1.0)
    bins = (scaled * scale).add_(scale + 0.5).int()  # rounds to the nearest, all being positive
    shift = bounds.index_select(0, bins).sub_(scaled).view(torch.int32) >> 31 & 8  # 8 where x > bound: the sign
    codes = (table.index_select(0, bins) >> shift).to(torch.uint8).view(torch.int16)  # the even one in the low byte
    return (codes << 4 | codes >> 8).to(torch.uint8)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    n = torch.Size(shape).numel()
    pairs = level_pairs(quant_type, packed.device).index_select(0, packed.reshape(-1).int())
    w = pairs.view(torch.float32)[:n]
    full = n // blocksize * blocksize
    blocks = w[:full].view(-1, blocksize)
    blocks *= absmax[: full // blocksize].unsqueeze(1)
    if full < n:
        w[full:] *= absmax[-1]
    return w.view(shape).to(dtype)


# ------------------------------------------------------------------------- double quantization


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    n = absmax.numel()
    x = torch.nn.functional.pad(absmax - offset, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    nested_absmax = x.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1)
    scaled = (x * (1.0 / nested_absmax).unsqueeze(1)).clamp(-1, 1)
    point = ((scaled + 1) * 32767.5 + 0.5).nan_to_num(nan=0.0).int()  # 0 · inf of a block of zeros is NaN: point 0
    codes = dynamic_codes(absmax.device).index_select(0, point.view(-1)[:n])
    return codes, nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    if cpu.takes(codes, dtype=torch.uint8) and cpu.takes(nested_absmax, offset, dtype=torch.float32):
        return cpu.packing.dequantize_absmax(codes, nested_absmax, offset)
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return dynamic_map(codes.device).index_select(0, codes.int()) * scale + offset


# --------------------------------------------------------------------------- linears: y = xWᵀ …
# x [T, in], w [out, in], lora_A [r, in], lora_B [out, r]; x and w in the compute dtype, adapters in theirs.


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def lora_linear(
    x: Tensor,
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [T, out], xa = s·drop(x)Aᵀ [T, r])"""
    a, b = factors(lora_A, lora_B, scaling, 1.0, x.dtype)
    return _adapted(x, dropout(x, p, seed), w, a, b, bias)


def factors(
    lora_A: Tensor, lora_B: Tensor, scale_A: float, scale_B: float, dtype: torch.dtype, a: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale_A · A, in `a` if it is given, scale_B · B) in `dtype`."""
    if dtype == torch.bfloat16 and cpu.takes(lora_A, lora_B, dtype=torch.float32):
        return cpu.elementwise.narrowed(lora_A, lora_B, scale_A, scale_B, a)
    scaled_A, scaled_B = (lora_A * scale_A).to(dtype), (lora_B * scale_B).to(dtype)
    return (scaled_A if a is None else a.copy_(scaled_A)), scaled_B


def wide_gradients(
    dA: Tensor, dB: Tensor, lora_A: Tensor, lora_B: Tensor, scale_A: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(scale_A · dA, dB) in the dtypes of A and B."""
    if lora_A.dtype == lora_B.dtype == torch.float32 and cpu.takes(dA, dB):
        return cpu.elementwise.widened(dA, dB, scale_A)
    return dA.to(lora_A.dtype).mul_(scale_A), dB.to(lora_B.dtype)


def _adapted(
    x: Tensor, xd: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(xWᵀ + xa·bᵀ + bias, xa = xd·aᵀ), all in x's dtype."""
    xa = torch.mm(xd, a.t())
    y = linear(xa, b, bias)  # the small term first: rounding it loses the least
    y.addmm_(x, w.t())
    return y, xa


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    w: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, in], or of no element if `w` is None because nobody needs it; dA; dB)"""
    a, b = factors(lora_A, lora_B, 1.0, scaling, x.dtype)
    dxa = torch.mm(dy, b)  # [T, r]
    dA, dB = torch.mm(dxa.t(), dropout(x, p, seed)), torch.mm(dy.t(), xa)
    if w is None:
        dx = x.new_empty(0)
    else:
        dx = dropout(torch.mm(dxa, a), p, seed)
        dx.addmm_(dy, w)
    return dx, *wide_gradients(dA, dB, lora_A, lora_B)


# --------------------------------------------------------------------------------------- DoRA


def weight_norm_sq(w: Tensor) -> Tensor:
    return w.float().square().sum(dim=1)


def dora_norm(w: Tensor, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + sBA‖ of each row, fp32 [out]; `norm_sq` is ‖W‖², fp32 [out]."""
    a = (lora_A * scaling).to(w.dtype)
    return norm_and_gain(w, norm_sq, lora_A, lora_B, a, scaling, norm_sq)[0]


def norm_and_gain(
    w: Tensor, norm_sq: Tensor, lora_A: Tensor, lora_B: Tensor, a: Tensor, scaling: float, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """(‖W + sBA‖ of each row, magnitude over it) fp32 [out]; `a` is sA in w's dtype."""
    u = torch.mm(w, a.t())  # s·WAᵀ [out, r]
    A, B = lora_A.float(), lora_B.float()
    v = torch.mm(B, cpu.norms.gram(A) if cpu.takes(u) and cpu.takes(A, dtype=torch.float32) else torch.mm(A, A.t()))
    # Where little is left of ‖W‖² the terms have cancelled, and their rounding with them has grown: compute the row
    # directly. The coarsest rounding is that of WAᵀ, in w's dtype. (sBA cannot be much longer than W there.)
    least = max(4e-3, 64 * torch.finfo(w.dtype).eps)
    if cpu.takes(u) and cpu.takes(B, v, norm_sq, magnitude, dtype=torch.float32):
        norm, gain, cancelled = cpu.norms.dora_norm(u, B, v, norm_sq, magnitude, scaling, least)
    else:
        total = norm_sq + (B * torch.add(2 * u.float(), v, alpha=scaling**2)).sum(dim=1)
        norm = total.sqrt().masked_fill_(total < norm_sq * least, -1.0)
        gain = dora_gain(magnitude, norm)
        cancelled = norm.amin() < 0
    if cancelled:
        rows = (norm < 0).nonzero().squeeze(1)
        norm[rows] = (w[rows].float() + scaling * B[rows] @ A).square().sum(dim=1).sqrt_()
        gain[rows] = dora_gain(magnitude[rows], norm[rows])
    return norm, gain


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / ‖W + sBA‖, fp32 [out]; 0 for a row of zeros, which has no direction to scale."""
    return (magnitude / norm).masked_fill_(norm == 0, 0.0)


def dora_linear(
    x: Tensor,
    w: Tensor,
    norm_sq: Tensor,
    norm: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y [T, out], xa [T, r], norm and gain fp32 [out], z [T, out] = drop(x)(W + sBA)ᵀ or empty where y holds it)"""
    a, b = factors(lora_A, lora_B, scaling, 1.0, x.dtype)
    if norm is None:
        norm, gain = norm_and_gain(w, norm_sq, lora_A, lora_B, a, scaling, magnitude)
    else:
        norm, gain = norm.clone(), dora_gain(magnitude, norm)
    xd = dropout(x, p, seed)
    z, xa = _adapted(xd, xd, w, a, b)
    if not p and bias is None:
        return scale_columns_(z, gain), xa, norm, gain, x.new_empty(0)
    g = gain.to(x.dtype)
    if p:
        # (x - drop(x))Wᵀ + g ⊙ z: what is dropped from the adapter still passes the base
        y = ((x - xd) @ w.t()).addcmul_(z, g)
        return (y if bias is None else y.add_(bias)), xa, norm, gain, z
    return torch.addcmul(bias.to(x.dtype), z, g), xa, norm, gain, z


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
    """(dx, dA, dB, dm); the norm counts as a constant (DoRA, Liu et al. 2024, §4.3). y is None where z is kept."""
    dz, total = scale_columns(dy, z if y is None else y, gain)
    xd = dropout(x, p, seed)
    dx, dA, dB = lora_linear_backward(dz, xd, xa, w if needs_dx else None, lora_A, lora_B, scaling, 0.0, None)
    if p and needs_dx:
        dx = dropout(dx, p, seed)
        through_base = dy @ w
        dx += through_base - dropout(through_base, p, seed)
    if y is None:
        return dx, dA, dB, _over_norm(total, norm).to(magnitude.dtype)
    dm = magnitude_gradient(total, dy, xd, w, lora_A, lora_B, magnitude, scaling, norm, gain)
    return dx, dA, dB, dm


def magnitude_gradient(
    total: Tensor,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    norm: Tensor,
    gain: Tensor,
) -> Tensor:
    """dm where `total` is Σ_t dy ⊙ y: z / ‖W + sBA‖ = y / m."""
    dm = total / magnitude
    # Where m = 0, or nearly, y has lost z's digits: compute z again.
    tiny = torch.finfo(x.dtype).tiny
    if cpu.norms.has_below(gain, tiny) if cpu.takes(gain, dtype=torch.float32) else (gain.abs() < tiny).any():
        rows = (gain.abs() < tiny).nonzero().squeeze(1)
        z_rows, _ = lora_linear(x, w[rows], lora_A, lora_B[rows], None, scaling, 0.0, None)
        dm[rows] = _over_norm(scale_columns(dy[:, rows], z_rows, gain[rows])[1], norm[rows])
    return dm.to(magnitude.dtype)


def scale_columns(dy: Tensor, kept: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(dz = gain ⊙ dy, Σ_t dy ⊙ kept in fp32 [out])"""
    if cpu.takes(dy, kept):
        return cpu.norms.scale_columns(dy, kept, gain)
    return dy * gain.to(dy.dtype), (dy * kept).sum(dim=0, dtype=torch.float32)


def scale_columns_(z: Tensor, gain: Tensor) -> Tensor:
    """gain ⊙ z in z's place."""
    return cpu.norms.scale_columns_(z, gain) if cpu.takes(z) else z.mul_(gain.to(z.dtype))


def _over_norm(total: Tensor, norm: Tensor) -> Tensor:
    """total / norm, 0 for a row of zeros."""
    return (total / norm).masked_fill_(norm == 0, 0.0)
