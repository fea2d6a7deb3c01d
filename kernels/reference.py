"""The readable torch twin of every op: its definition, the oracle of its tests and what runs on a CPU.

Each twin takes and returns what the op of the same name does (see that op's file for shapes and formats).
"""

import torch
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE, dynamic_bounds, dynamic_map, nf4_bounds, nf4_levels

# ---------------------------------------------------------------------------------------- NF4


def _scale_blocks(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Divide flat fp32 `x` [n] by its blockwise absmax: (x / absmax in [-1, 1] [n], absmax [ceil(n / blocksize)])."""
    full = x.numel() // blocksize * blocksize
    blocks, tail = x[:full].view(-1, blocksize), x[full:]
    absmax = blocks.abs().amax(dim=1)
    # bitsandbytes multiplies full blocks by 1/absmax but divides the partial last one, and there alone stores
    # 1e-38 for an all-zero block. Codes on a decision bound depend on it, so we do the same.
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1).view(-1)
    if tail.numel():
        tail_absmax = tail.abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, tail_absmax.view(1)])
        scaled = torch.cat([scaled, (tail / tail_absmax).clamp(-1, 1)])
    return scaled, absmax


def quantize_nf4(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    scaled, absmax = _scale_blocks(w.reshape(-1).float(), blocksize)
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = torch.bucketize(scaled, nf4_bounds(w.device), out_int32=True).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    n = torch.Size(shape).numel()
    w = _nf4_pairs(packed.device)[packed.reshape(-1).int()].view(-1)[:n]  # fp32 [n]
    full = n // blocksize * blocksize
    blocks = w[:full].view(-1, blocksize)
    blocks *= absmax[: full // blocksize].unsqueeze(1)
    if full < n:
        w[full:] *= absmax[-1]
    return w.view(shape).to(dtype)


def _nf4_pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two levels of a packed byte, the even element (high nibble) first."""
    levels = nf4_levels(device)
    return torch.cartesian_prod(levels, levels)


# ------------------------------------------------------------------------- double quantization


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    scaled, nested_absmax = _scale_blocks(absmax - offset, NESTED_BLOCKSIZE)
    codes = torch.bucketize(scaled, dynamic_bounds(absmax.device), out_int32=True).to(torch.uint8)
    return codes, nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return dynamic_map(codes.device)[codes.int()] * scale + offset
