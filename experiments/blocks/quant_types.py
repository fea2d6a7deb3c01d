"""Blockwise data types of two to eight bits: a weight packed and unpacked, its storage and its error.

    nf4 fp4 int4      those that the kernels pack (kernels/codebook.py)
    mxfp4 nvfp4       packed by the kernels too, in blocks of one size with scales of 8 bits
    nf2 nf3 … nf8     the NormalFloat of so many bits, by QLoRA's recipe; nf4 is the kernels'

A value x in a block becomes absmax · q, q the level nearest to x / absmax. With double quantization absmax is stored in
8 bits. Types of other widths than four bits are computed as the kernels would do it, but stay dense: they serve
comparisons.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels import dequantize_absmax, quantize_absmax
from kernels.codebook import BLOCKSIZES, NESTED_BLOCKSIZE, normal_float, quant_types
from kernels.weight import nested_blocks

_NORMAL_FLOAT = re.compile(r"nf([2-8])")


def check_quant_type(quant_type: str) -> None:
    """Raise ValueError unless there is such a data type."""
    if quant_type not in quant_types() and not _NORMAL_FLOAT.fullmatch(quant_type):
        raise ValueError(f"{quant_type!r} is not one of {', '.join(quant_types())} or nfK with K from 2 to 8")


def code_bits(quant_type: str) -> int:
    """Bits of a code."""
    return 4 if quant_type in quant_types() else int(_NORMAL_FLOAT.fullmatch(quant_type)[1])


def stored_bits(n: int, quant_type: str, blocksize: int, double: bool) -> int:
    """Stored bits of n weights: codes, filled up to whole bytes, absmax and its own constants."""
    blocks = -(-n // blocksize)
    constants = 8 * blocks + 32 * nested_blocks(blocks) + 32 if double else 32 * blocks
    return 8 * -(-n * code_bits(quant_type) // 8) + constants


def constant_bits_per_weight(blocksize: int, double: bool) -> float:
    """Bits a weight of absmax, without its mean, which is one number a tensor: 0.5, or 0.127 at block 64."""
    return 8 / blocksize + 32 / (blocksize * NESTED_BLOCKSIZE) if double else 32 / blocksize


@torch.no_grad()
def quantize_dequantize(w: Tensor, quant_type: str, blocksize: int, double: bool) -> Tensor:
    """`w` packed and unpacked again: fp32, any shape.

    Raises:
        ValueError: no such data type or block size.
    """
    check_quant_type(quant_type)
    if quant_type in quant_types():
        return kernels.dequantize_4bit(*kernels.quantize_4bit(w, blocksize, double, quant_type))
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")
    n = w.numel()
    blocks = torch.nn.functional.pad(w.reshape(-1).float(), (0, -n % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    levels = normal_float(code_bits(quant_type)).to(w.device)
    codes = torch.bucketize(blocks / absmax.clamp(min=1e-38)[:, None], (levels[:-1] + levels[1:]) / 2)
    if double:
        absmax = dequantize_absmax(*quantize_absmax(absmax))
    return (levels[codes] * absmax[:, None]).view(-1)[:n].view(w.shape)


@dataclass
class Errors:
    """Errors of one or more tensors, added up.

    Attributes:
        squares, error_squares: Σ w² and Σ (w' − w)², in float64.
        largest: max |w' − w|.
        n: values.
    """

    squares: float = 0.0
    error_squares: float = 0.0
    largest: float = 0.0
    n: int = 0

    def add(self, w: Tensor, quantized: Tensor) -> None:
        """Count in `w` and its packed and unpacked form."""
        error = (quantized.double() - w.double()).view(-1)
        self.squares += w.double().square().sum().item()
        self.error_squares += error.dot(error).item()
        self.largest = max(self.largest, error.abs().max().item())
        self.n += w.numel()

    @property
    def rms_relative(self) -> float:
        """‖w' − w‖ / ‖w‖."""
        return (self.error_squares / self.squares) ** 0.5

    @property
    def max_relative(self) -> float:
        """max |w' − w| over the root mean square of w."""
        return self.largest / (self.squares / self.n) ** 0.5

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio, 10 · log₁₀ Σw² / Σ(w' − w)², in dB."""
        return -20 * torch.tensor(self.rms_relative, dtype=torch.float64).log10().item()
