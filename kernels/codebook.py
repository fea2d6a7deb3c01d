"""The numbers behind the 4-bit and 8-bit data types: the one place they are written.

A 4-bit data type is one entry of CODEBOOKS: the sixteen values in [-1, 1] that its codes stand for. A value x gets
the code of the nearest level; a value exactly half-way between two levels gets the lower one, as in bitsandbytes.

NF4 (QLoRA, Dettmers et al. 2023, appendix E): levels at quantiles of N(0, 1), normalised to [-1, 1], with an exact
zero; `normal_float` is the recipe. FP4: bitsandbytes' floats of a sign, two exponent bits and one mantissa bit.
INT4: code - 8 is the integer, -7 … 7 under absmax scaling.

A block format is one entry of BLOCK_FORMATS: levels, block size and the type of the blocks' scales are fixed, and the
levels are not under absmax scaling. MXFP4 (OCP Microscaling Formats 1.0, 2023) and NVFP4 (NVIDIA, "Pretraining large
language models with NVFP4", 2025) have the levels of E2M1, a float of a sign, two exponent bits and one mantissa bit.
A value half-way between two levels gets the one with an even mantissa there.

Dynamic maps (Dettmers 2016, "8-bit approximations for parallelism in deep learning"): 256 values, seven decades, ever
more mantissa bits towards 1. The signed one is the data type of the second quantization in double quantization and of
8-bit AdamW's first moment, the unsigned one that of its second moment.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# What the code with that index stands for, in any order.
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": NF4_LEVELS,
    "fp4": tuple(v / 12 for v in (0, 1 / 16, 8, 12, 4, 6, 2, 3, 0, -1 / 16, -8, -12, -4, -6, -2, -3)),
    "int4": tuple((code - 8) / 7 for code in range(16)),
}

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class BlockFormat:
    """A 4-bit format that fixes the scales of its blocks.

    Attributes:
        levels: of each code.
        blocksize: values that share a scale.
        scale_dtype: the 8-bit float of a scale. float8_e8m0fnu has powers of two alone.
        per_tensor: an fp32 number of the whole tensor multiplies the scales.
    """

    levels: tuple[float, ...]
    blocksize: int
    scale_dtype: torch.dtype
    per_tensor: bool


BLOCK_FORMATS: dict[str, BlockFormat] = {
    "mxfp4": BlockFormat(E2M1_LEVELS, 32, torch.float8_e8m0fnu, per_tensor=False),
    "nvfp4": BlockFormat(E2M1_LEVELS, 16, torch.float8_e4m3fn, per_tensor=True),
}

BITSANDBYTES_TYPES = ("nf4", "fp4")  # that bitsandbytes has too, the same byte for byte

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # block of the second quantization; bitsandbytes writes no other


def quant_types() -> tuple[str, ...]:
    """The names of all 4-bit data types."""
    return (*CODEBOOKS, *BLOCK_FORMATS)


def default_blocksize(quant_type: str) -> int:
    """64, or the one size that the format has."""
    return BLOCK_FORMATS[quant_type].blocksize if quant_type in BLOCK_FORMATS else 64


def _table(make: Callable) -> Callable:
    """Decorator: `make` runs once for each of its arguments, on the CPU whatever torch's default device is then."""

    @functools.cache
    @functools.wraps(make)
    def remembered(*args, **kwargs):
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return remembered


def _midpoints(levels: torch.Tensor) -> torch.Tensor:
    """fp32 decision bounds [n - 1] between sorted fp32 levels [n]."""
    return (levels[:-1] + levels[1:]) / 2


@_table
def levels(quant_type: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The level of each code, fp32 [16]."""
    of_codes = BLOCK_FORMATS[quant_type].levels if quant_type in BLOCK_FORMATS else CODEBOOKS[quant_type]
    return torch.tensor(of_codes, dtype=torch.float32, device=device)


@_table
def decision_bounds(quant_type: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(decision bounds fp32 [15], codes uint8 [16]): the code of x is codes[number of bounds below x]."""
    ordered, codes = levels(quant_type).sort(stable=True)
    bounds = _midpoints(ordered)
    if quant_type in BLOCK_FORMATS:
        codes[ordered == 0] = codes[ordered == 0].flip(0)  # -0 before 0
        # A tie goes up where the upper code has an even mantissa: there the bound is the number below it.
        below = bounds.nextafter(torch.tensor(-torch.inf))
        below[bounds == 0] = -torch.finfo(torch.float32).tiny  # a GPU may take smaller ones for 0
        bounds = torch.where(codes[1:] % 2 == 0, below, bounds)
    return bounds.to(device), codes.to(torch.uint8).to(device)


@_table
def code_table(quant_type: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The tables in which a Triton kernel finds the code of x in [-1, 1]: (codes int32, bounds fp32, are they by bin?).

    By bin [64], [64] where levels ascend with the code and neighbouring bounds are more than 1/16 apart: x is in bin
    k = round(16 · x) + 16, which holds at most one bound, and its code is codes[k] + (x > bounds[k]). Bins above 32
    only fill the table up to a power of two.

    Otherwise a search tree [16], [16]: from node 1 go to 2 · node + (x > bounds[node]), four times; the code is
    codes[node - 16].
    """
    limits, codes = decision_bounds(quant_type)
    if limits.diff().min() > 1 / 16 and torch.equal(codes, torch.arange(16, dtype=torch.uint8)):
        lower_edge = (torch.arange(64) - 16.5) / 16
        below = torch.bucketize(lower_edge, limits, out_int32=True)
        return below.to(device), torch.cat([limits, torch.tensor([torch.inf])])[below].to(device), True
    # Level by level: the middle of what is left, then the middles of its halves, …
    tree = [0, 7, 3, 11, 1, 5, 9, 13, 0, 2, 4, 6, 8, 10, 12, 14]
    return codes.int().to(device), limits[tree].to(device), False


@_table
def bin_table(quant_type: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, int]:
    """The tables in which the reference finds the code of x in [-1, 1]: (codes int32, bounds fp32, scale).

    As `code_table` by bin, but with bins as narrow as any codebook needs to have one bound a bin at most: x is in bin
    k = round(scale · x) + scale; the low byte of codes[k] is its code if x ≤ bounds[k], the next byte otherwise.
    """
    limits, in_order = decision_bounds(quant_type)
    scale = 16
    while limits.diff().min() <= 1 / scale:
        scale *= 2
    lower_edge = (torch.arange(2 * scale + 1) - scale - 0.5) / scale
    below = torch.bucketize(lower_edge, limits)
    codes = in_order[below].int() | in_order[(below + 1).clamp(max=15)].int() << 8
    return codes.to(device), torch.cat([limits, torch.tensor([torch.inf])])[below].to(device), scale


@_table
def level_pairs(quant_type: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The two levels of every packed byte, fp32 [256, 2] seen as int64 [256], the even element (high nibble) first.

    One 8-byte item a byte: a lookup of items is three times as fast on a CPU as one of rows of two floats.
    """
    both = levels(quant_type)
    return torch.cartesian_prod(both, both).view(torch.int64).view(256).to(device)


def normal_float(bits: int) -> torch.Tensor:
    """The levels of the k-bit NormalFloat, fp32 [2^k], ascending: 2^(k-1) - 1 below zero, zero, 2^(k-1) above.

    Each half holds evenly spaced quantiles of N(0, 1). The outermost quantile is 1 − δ. δ is the mean of 1/2^(k+1) and
    1/(2^(k+1) − 2). All levels are divided by the largest. QLoRA §3 and appendix E. δ is rounded and the quantiles are
    taken in fp32 as its authors' code (bitsandbytes' `create_normal_map`) does: normal_float(4) is NF4_LEVELS to the
    last bit.

    Raises:
        ValueError: `bits` is not 2 … 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"a NormalFloat of {bits} bits: choose 2 to 8")
    half = 2 ** (bits - 1)
    outermost = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)

    def quantiles(n: int) -> torch.Tensor:
        return torch.special.ndtri(torch.linspace(outermost, 0.5, n + 1)[:-1].double()).float()

    ordered = torch.cat([-quantiles(half - 1), torch.zeros(1), quantiles(half).flip(0)])
    return ordered / ordered[-1]


@_table
def dynamic_map(device: torch.device | str = "cpu", signed: bool = True) -> torch.Tensor:
    """bitsandbytes' dynamic map, fp32 [256], ascending; has an exact 0 and a 1 but no -1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        for value in (_midpoints(edges) * 10.0 ** (exponent - 6)).tolist():
            values += [value, -value] if signed else [value]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@_table
def absmax_map(quant_type: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """What the 8-bit codes of a block's absmax or scale stand for, fp32 [256]: the signed dynamic map, or of a block
    format the float that has the code as its byte."""
    if quant_type not in BLOCK_FORMATS:
        return dynamic_map(device)
    bytes = torch.arange(256, dtype=torch.uint8)
    return bytes.view(BLOCK_FORMATS[quant_type].scale_dtype).float().to(device)


@_table
def dynamic_bounds(device: torch.device | str = "cpu", signed: bool = True) -> torch.Tensor:
    """Decision bounds of `dynamic_map`, fp32 [256]: the code nearest to x is the number of bounds below x. The last
    one is inf."""
    bounds = _midpoints(dynamic_map("cpu", signed))
    return torch.cat([bounds, torch.tensor([torch.inf])]).to(device)


@_table
def dynamic_bins(device: torch.device | str = "cpu", signed: bool = True) -> torch.Tensor:
    """Code of the least x in each bin, uint8 [65536]; the code of any x in that bin is c or c + 1.

    The bin of x is the upper 16 bits of its fp32 form. Two neighbouring bounds differ by at least 1/128 of their size,
    so a bin holds one bound at most. NaN counts as 0.
    """
    bins = torch.arange(-32768, 32768, dtype=torch.int32).roll(32768)  # as signed numbers, whose upper half they are
    least = (bins << 16 | (bins < 0).int() * 0xFFFF).view(torch.float32)  # of negative numbers the largest in size
    codes = torch.bucketize(least.nan_to_num(nan=0.0), dynamic_bounds("cpu", signed))
    return codes.clamp(max=254).to(torch.uint8).to(device)


@_table
def dynamic_codes(device: torch.device | str = "cpu") -> torch.Tensor:
    """Code of the nearest `dynamic_map` value at each of 65536 points evenly spread over [-1, 1], uint8 [65536].

    bitsandbytes' CPU library quantizes through such a table, so a value gets the code of the nearest *point*: 0 has
    no point of its own and becomes the code of 1/65535 (131, not 127).
    """
    points = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535
    return torch.bucketize(points, _midpoints(dynamic_map("cpu"))).to(torch.uint8).to(device)
