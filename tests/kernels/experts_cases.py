"""For the tests of the linears of experts: who has which rows, weights, and the formula, one expert at a time."""

import dataclasses

import torch
from torch import Tensor

from kernels import Weight, dequantize_4bit, quantize_4bit
from kernels.codebook import BLOCK_FORMATS
from kernels.dropout import seed_of
from tests.kernels.linear_cases import BASES, dropout_seed, plain_linear, randn

KINDS = ("linear", "lora", "dora")
SCALING = 1.5


@dataclasses.dataclass(frozen=True)
class Shape:
    """`rows` of each expert, then `nobody`'s; odd sizes make NF4 blocks cross from one expert into the next."""

    rows: tuple[int, ...]
    nobody: int = 0
    columns: int = 64
    out: int = 48
    rank: int = 16
    bias: bool = False
    p: float = 0.0

    @property
    def ends(self) -> Tensor:
        return torch.tensor(self.rows).cumsum(0).int()

    @property
    def tokens(self) -> int:
        return sum(self.rows) + self.nobody

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.rows)), f"K{self.columns}", f"N{self.out}", f"r{self.rank}"]
        parts += [f"nobody{self.nobody}"] * bool(self.nobody) + ["bias"] * self.bias + [f"drop{self.p}"] * bool(self.p)
        return "-".join(parts)


CASES = (  # with the kind of weight
    *[(Shape((3, 0, 9, 1), columns=64, out=48), kind) for kind in BASES],  # one without a row
    (Shape((0, 0, 11, 0), columns=33, out=17, rank=3, bias=True), "nf4-double"),  # all on one
    (Shape((0, 1), columns=130, out=95, rank=1, bias=True, p=0.3), "nf4"),  # one row in all
    (Shape((5, 4, 3), nobody=4, columns=96, out=40, rank=33, p=0.1), "dense"),
    (Shape((2, 20), nobody=1, columns=64, out=40, rank=64, bias=True), "nf4-double"),
    *[(Shape((3, 0, 5), columns=64, out=24, rank=4), kind) for kind in BLOCK_FORMATS],
)


def make_experts(kind: str, shape: Shape, dtype: torch.dtype, blocksize: int = 64) -> tuple[Weight, Tensor]:
    """(the weight, the numbers that it stands for in fp32)"""
    dense = randn(len(shape.rows), shape.out, shape.columns, seed=1, dtype=dtype) / shape.columns**0.5
    if kind == "dense":
        return Weight(dense), dense.float()
    if kind in BLOCK_FORMATS:
        packed, state = quantize_4bit(dense, quant_type=kind)
    else:
        packed, state = quantize_4bit(dense, blocksize, double_quant=kind == "nf4-double")
    return Weight(packed, state), dequantize_4bit(packed, state, torch.float32)


def make_tensors(op: str, shape: Shape, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
    """({x and adapters, which train in fp32}, bias, dy)"""
    experts = len(shape.rows)
    tensors = {
        "x": randn(shape.tokens, shape.columns, seed=2, dtype=dtype),
        "lora_A": randn(experts, shape.rank, shape.columns, seed=3) / shape.columns**0.5,
        "lora_B": randn(experts, shape.out, shape.rank, seed=4) / shape.rank**0.5,
        "magnitude": randn(experts, shape.out, seed=8).abs() + 0.5,
    }
    names = {"linear": ("x",), "lora": ("x", "lora_A", "lora_B"), "dora": tuple(tensors)}[op]
    bias = randn(experts, shape.out, seed=5, dtype=dtype) if shape.bias else None
    dy = randn(shape.tokens, shape.out, seed=6, dtype=dtype)
    return {name: tensors[name] for name in names}, bias, dy


def plain_experts(shape: Shape, w: Tensor, bias: Tensor | None):
    """The formula as a function of x and the adapters, each expert on its own, all in x's dtype."""

    def plain(x: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None, magnitude: Tensor | None = None):
        ys, start = [], 0
        for e, end in enumerate(shape.ends.tolist()):
            rows, start = x[start:end], end
            own_bias = None if bias is None else bias[e].to(x.dtype)
            if lora_A is None:
                ys.append(torch.nn.functional.linear(rows, w[e].to(x.dtype), own_bias))
                continue
            own_magnitude = None if magnitude is None else magnitude[e]
            seed = seed_of(dropout_seed(), e)
            ys.append(plain_linear(rows, w[e], lora_A[e], lora_B[e], SCALING, own_bias, own_magnitude, shape.p, seed))
        return torch.cat([*ys, x.new_zeros(shape.nobody, w.shape[1])])

    return plain
