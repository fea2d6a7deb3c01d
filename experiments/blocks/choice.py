"""A block size for each linear: the least predicted rise of the loss under a budget for constants.

    minimise Σ_l rise(l, b_l)   subject to   Σ_l bits(l, b_l) ≤ budget,   b_l one of the sizes that linear l may have

bits(l, b) counts the constants that kernels.quantize_4bit stores beside the codes: 32 a block, or with double
quantization 8 a block, 32 for every 256 blocks and 32 for their mean; a partial block, or a partial 256, counts whole.
This is a multiple-choice knapsack. `solve` finds the best choice with SciPy's MILP solver (HiGHS); `solve_greedily`
buys, as long as something fits, the smaller block that lowers the rise the most for its bits.
"""

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from transformers import PreTrainedConfig

from experiments.blocks.quant_map import Shapes
from experiments.errors import UserError
from kernels.codebook import BLOCKSIZES
from kernels.weight import nested_blocks, packed_sizes

ALIGNMENTS = ("none", "row", "head")
# Whose output rows belong to attention heads, head_dim rows each.
PER_HEAD = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")


def constant_bits(n: int, blocksize: int, double: bool) -> int:
    """Bits of the constants of n weights, exactly as they are stored."""
    _, blocks = packed_sizes(n, blocksize)
    return 8 * blocks + 32 * nested_blocks(blocks) + 32 if double else 32 * blocks


def code_bits(shapes: Shapes) -> int:
    """Bits of the codes of all linears; an odd number of weights fills its last byte."""
    return sum(8 * packed_sizes(math.prod(shape), BLOCKSIZES[0])[0] for shape in shapes.values())


def bits_per_weight(shapes: Shapes, constants: int) -> float:
    """Bits a weight, codes included, where all constants take `constants` bits."""
    return (code_bits(shapes) + constants) / sum(map(math.prod, shapes.values()))


def allowed_sizes(
    shapes: Shapes, candidates: list[int], align: str, architecture: PreTrainedConfig
) -> dict[str, list[int]]:
    """The candidates that each linear may have, in ascending order: none larger than the linear, and none whose blocks
    would cross what `align` keeps apart.

    Args:
        align: none; row: the rows of every weight; head: in the linears that make queries, keys and values, the rows of
            one attention head from the next head's.

    Raises:
        UserError: a candidate is not a block size, no candidate fits a linear, or no linear has heads.
    """
    if align not in ALIGNMENTS:
        raise UserError(f"quant.align={align}: choose {', '.join(ALIGNMENTS)}")
    if wrong := [size for size in candidates if size not in BLOCKSIZES]:
        raise UserError(f"candidates: {wrong[0]} is not a block size; choose from {', '.join(map(str, BLOCKSIZES))}")
    if not candidates:
        raise UserError(f"candidates is empty; choose from {', '.join(map(str, BLOCKSIZES))}")
    if align == "head" and not any(name.endswith(PER_HEAD) for name in shapes):
        raise UserError(f"quant.align=head: no linear of this model is named {', '.join(PER_HEAD)}")
    allowed = {}
    for name, shape in shapes.items():
        in_features, weights = shape[-1], math.prod(shape)
        small = [size for size in sorted(set(candidates)) if size <= weights]
        if not small:
            raise UserError(
                f"{name} has {weights} weights, less than a block of any of "
                f"candidates=[{','.join(map(str, candidates))}]: add a smaller one"
            )
        if align == "row":
            unit = in_features
        elif align == "head" and name.endswith(PER_HEAD):
            unit = head_rows(architecture) * in_features
        else:
            allowed[name] = small
            continue
        allowed[name] = [size for size in small if unit % size == 0]
        if not allowed[name]:
            fitting = ", ".join(str(b) for b in BLOCKSIZES if unit % b == 0) or "none"
            raise UserError(
                f"quant.align={align}: no candidate divides {name}'s {unit} weights a {align}; block sizes that do: "
                f"{fitting}"
            )
    return allowed


def head_rows(architecture: PreTrainedConfig) -> int:
    """Rows of a query, key or value projection that make one attention head."""
    text = architecture.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def budget_bits(shapes: Shapes, share: float | None, bits: float | None) -> int:
    """The most bits that all constants may take together.

    Args:
        share: of the codes' bytes.
        bits: a weight, codes included; instead of `share`.
    """
    if bits is not None:
        return math.floor(bits * sum(map(math.prod, shapes.values()))) - code_bits(shapes)
    return math.floor(share * code_bits(shapes))


@dataclass(frozen=True)
class Problem:
    """The options of the choice, and its budget.

    Attributes:
        rises: the predicted rise by linear and by each block size it may have.
        bits: of the constants, likewise.
        budget: the most bits of all constants together.
    """

    rises: Mapping[str, Mapping[int, float]]
    bits: Mapping[str, Mapping[int, int]]
    budget: int

    def rise(self, choice: Mapping[str, int]) -> float:
        return sum(self.rises[name][blocksize] for name, blocksize in choice.items())

    def spent(self, choice: Mapping[str, int]) -> int:
        return sum(self.bits[name][blocksize] for name, blocksize in choice.items())


def option_bits(shapes: Shapes, allowed: Mapping[str, list[int]], double: bool, budget: int) -> dict:
    """Bits of the constants by linear and by each block size in `allowed`.

    Raises:
        UserError: no choice meets the budget; the message names the smallest possible budget.
    """
    bits = {
        name: {size: constant_bits(math.prod(shapes[name]), size, double) for size in sizes}
        for name, sizes in allowed.items()
    }
    least = sum(min(of_layer.values()) for of_layer in bits.values())
    if least > budget:
        share, a_weight = least / code_bits(shapes), bits_per_weight(shapes, least)
        raise UserError(
            f"the constants take at least {least:,} bits, the budget is {max(budget, 0):,}: the smallest possible is "
            f"budget={math.ceil(share * 1e6) / 1e6:g}, which is bits={math.ceil(a_weight * 1e5) / 1e5:.5f}"
        )
    return bits


def pose(bits: Mapping[str, Mapping[int, int]], rises: Mapping[str, Mapping[int, float]], budget: int) -> Problem:
    """The problem of choosing among the options in `bits`; `rises` has the predicted rise of each."""
    return Problem(
        {name: {size: rises[name][size] for size in options} for name, options in bits.items()}, bits, budget
    )


def solve(problem: Problem) -> dict[str, int]:
    """The block size of each linear that gives the least predicted rise, by integer programming."""
    options = [(name, size) for name, rises in problem.rises.items() for size in rises]
    rise = numpy.array([problem.rises[name][size] for name, size in options])
    # Bits above a linear's cheapest option: small numbers, of which the solver's tolerance is a small part.
    floor = {name: min(bits.values()) for name, bits in problem.bits.items()}
    excess = numpy.array([problem.bits[name][size] - floor[name] for name, size in options], dtype=float)
    row = {name: number for number, name in enumerate(problem.rises)}
    one_each = csr_array((numpy.ones(len(options)), ([row[name] for name, _ in options], range(len(options)))))
    scale = max(numpy.abs(rise).sum(), 1e-300) / 1e6  # HiGHS stops at an absolute gap of 1e-6
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(excess[None] / 8, -numpy.inf, (problem.budget - sum(floor.values())) / 8),
    ]
    with _nothing_printed():
        found = milp(
            rise / scale, integrality=1, bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0}
        )
    if found.x is None:
        raise RuntimeError(f"the solver gave up: {found.message}")
    choice = {name: size for (name, size), chosen in zip(options, found.x) if chosen > 0.5}
    if len(choice) < len(row) or problem.spent(choice) > problem.budget:
        raise RuntimeError("the solver's choice breaks the budget or leaves a linear out")
    return choice


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """HiGHS prints a line that no setting silences, from C: https://github.com/jump-dev/HiGHS.jl/issues/312."""
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
        ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def solve_greedily(problem: Problem) -> dict[str, int]:
    """Start with the fewest bits. Buy the smaller block that lowers the rise the most a bit, again and again, while it
    fits."""
    choice = {name: min(bits, key=bits.get) for name, bits in problem.bits.items()}
    left = problem.budget - problem.spent(choice)
    while True:
        best, best_rate = None, 0.0
        for name, now in choice.items():
            for size, bits in problem.bits[name].items():
                more = bits - problem.bits[name][now]
                saved = problem.rises[name][now] - problem.rises[name][size]
                if 0 < more <= left and saved / more > best_rate:
                    best, best_rate = (name, size, more), saved / more
        if best is None:
            return choice
        name, size, more = best
        choice[name], left = size, left - more
