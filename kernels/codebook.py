"""The numbers behind the 4-bit and 8-bit data types: the one place they are written.

NF4 (QLoRA, Dettmers et al. 2023, appendix E): sixteen levels at quantiles of N(0, 1), normalised to [-1, 1],
with an exact zero. A value x in [-1, 1] gets the code of the nearest level; a value exactly half-way between two
levels gets the lower one, as in bitsandbytes.

Signed dynamic map (Dettmers 2016, "8-bit approximations for parallelism in deep learning"): 256 values, seven
decades, ever more mantissa bits towards 1. It is the data type of the second quantization in double quantization.
"""

from functools import cache

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

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # block of the second quantization; bitsandbytes writes no other


def _midpoints(levels: torch.Tensor) -> torch.Tensor:
    """fp32 decision bounds [n - 1] between sorted fp32 levels [n]."""
    return (levels[:-1] + levels[1:]) / 2


@cache
def nf4_levels(device: torch.device | str = "cpu") -> torch.Tensor:
    """NF4 levels, fp32 [16], ascending."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@cache
def nf4_bounds(device: torch.device | str = "cpu") -> torch.Tensor:
    """Decision bounds, fp32 [15]: code(x) is the number of bounds below x."""
    return _midpoints(nf4_levels("cpu")).to(device)


@cache
def nf4_bins(device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """The decision bounds by bin: (codes int32 [64], bounds fp32 [64]), code(x) = codes[k] + (x > bounds[k]).

    x in [-1, 1] is in bin k = round(16 · x) + 16. Neighbouring bounds are more than 1/16 apart, so a bin holds at
    most one. Bins above 32 only fill the table up to a power of two.
    """
    lower_edge = (torch.arange(64) - 16.5) / 16
    codes = torch.bucketize(lower_edge, nf4_bounds("cpu"), out_int32=True)
    bounds = torch.cat([nf4_bounds("cpu"), torch.tensor([torch.inf])])[codes]
    return codes.to(device), bounds.to(device)


@cache
def nf4_pairs(device: torch.device | str = "cpu") -> torch.Tensor:
    """The two levels of every packed byte, fp32 [256, 2] seen as int64 [256], the even element (high nibble) first.

    One 8-byte item a byte: a lookup of items is three times as fast on a CPU as one of rows of two floats.
    """
    levels = nf4_levels("cpu")
    return torch.cartesian_prod(levels, levels).view(torch.int64).view(256).to(device)


@cache
def dynamic_map(device: torch.device | str = "cpu") -> torch.Tensor:
    """bitsandbytes' signed dynamic map, fp32 [256], ascending; has an exact 0 and a 1 but no -1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        for value in (_midpoints(edges) * 10.0 ** (exponent - 6)).tolist():
            values += [value, -value]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def dynamic_codes(device: torch.device | str = "cpu") -> torch.Tensor:
    """Code of the nearest `dynamic_map` value at each of 65536 points evenly spread over [-1, 1], uint8 [65536].

    bitsandbytes' CPU library quantizes through such a table, so a value gets the code of the nearest *point*: 0 has
    no point of its own and becomes the code of 1/65535 (131, not 127).
    """
    points = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535
    return torch.bucketize(points, _midpoints(dynamic_map("cpu"))).to(torch.uint8).to(device)
