"""The choice of block sizes: bits as they are stored, MILP against every choice there is, what is refused."""

import itertools
import math

import numpy
import pytest
import torch
from transformers import LlamaConfig

import kernels
from experiments.blocks.choice import (
    Problem,
    allowed_sizes,
    bits_per_weight,
    budget_bits,
    code_bits,
    constant_bits,
    option_bits,
    pose,
    solve,
    solve_greedily,
)
from experiments.errors import UserError
from kernels.codebook import BLOCKSIZES

ARCHITECTURE = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n", [1, 31, 32, 4097, 8192 * 4 + 2, 32 * 256 * 3 + 1])
def test_bits_are_those_that_are_stored(n, double):
    for blocksize in BLOCKSIZES:
        packed, state = kernels.quantize_4bit(torch.randn(n), blocksize, double)
        stored = sum(8 * tensor.nbytes for tensor in state.tensors() if tensor is not None)
        assert constant_bits(n, blocksize, double) == stored
        assert code_bits({"a": (1, n)}) == 8 * packed.nbytes


def test_the_textbook_s_bits():
    n = 2**24
    assert constant_bits(n, 64, False) / n == 32 / 64
    assert constant_bits(n, 64, True) == n * 8 // 64 + n * 32 // (64 * 256) + 32  # 0.127 a weight, and the offset
    shapes = {"a": (2**12, 2**12)}
    assert bits_per_weight(shapes, constant_bits(n, 64, True)) == pytest.approx(4.127, abs=1e-4)
    assert budget_bits(shapes, 0.05, None) == math.floor(0.05 * 4 * n)
    assert budget_bits(shapes, 0.05, 4.127) == math.floor(0.127 * n)  # bits decide where both are there
    assert budget_bits({"a": (3, 3)}, None, 5.0) == 45 - 40  # nine codes fill five bytes


def random_problem(rng, layers, sizes, convex):
    rises, bits = {}, {}
    for layer in map(str, range(layers)):
        options = sorted(rng.choice(BLOCKSIZES, size=sizes, replace=False).tolist())
        values = rng.exponential(size=sizes) * 10.0 ** rng.integers(-6, 1)
        rises[layer] = dict(zip(options, numpy.sort(values) if convex else values))
        n = int(rng.integers(4096, 60000))
        bits[layer] = {size: constant_bits(n, size, True) for size in options}
    least = sum(min(b.values()) for b in bits.values())
    most = sum(max(b.values()) for b in bits.values())
    return Problem(rises, bits, int(rng.integers(least, most + 1)))


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_is_better(seed):
    rng = numpy.random.default_rng(seed)
    problem = random_problem(rng, layers=5, sizes=4, convex=seed % 2)
    every = (dict(zip(problem.rises, sizes)) for sizes in itertools.product(*problem.rises.values()))
    least = min(problem.rise(choice) for choice in every if problem.spent(choice) <= problem.budget)
    best, greedy = solve(problem), solve_greedily(problem)
    assert problem.spent(best) <= problem.budget and problem.spent(greedy) <= problem.budget
    assert problem.rise(best) == pytest.approx(least, rel=1e-9)
    assert problem.rise(best) <= problem.rise(greedy) * (1 + 1e-9)


def test_exact_is_better_than_greedy_where_greed_fails():
    rises = {"a": {32: 0.0, 64: 10.0}, "b": {32: 0.0, 64: 9.0}, "c": {32: 0.0, 64: 9.0}}
    bits = {"a": {32: 11, 64: 1}, "b": {32: 10, 64: 1}, "c": {32: 10, 64: 1}}
    problem = Problem(rises, bits, 21)
    assert problem.rise(solve_greedily(problem)) > problem.rise(solve(problem)) == 10.0


def test_a_budget_met_to_the_bit_and_one_bit_less():
    shapes = {"a": (10, 1000), "b": (7, 999)}
    rises = {name: {size: size / n for size in (32, 64, 4096)} for name, n in (("a", 5), ("b", 3))}
    allowed = {name: [32, 64, 4096] for name in shapes}
    exact = sum(constant_bits(math.prod(shape), 32, True) for shape in shapes.values())

    def problem(budget):
        return pose(option_bits(shapes, allowed, True, budget), rises, budget)

    assert solve(problem(exact)) == {"a": 32, "b": 32}
    less = problem(exact - 1)
    assert less.spent(solve(less)) < exact
    least = sum(constant_bits(math.prod(shape), 4096, True) for shape in shapes.values())
    assert solve(problem(least)) == {"a": 4096, "b": 4096}
    with pytest.raises(UserError, match="smallest possible is budget=") as error:
        problem(least - 1)
    share, bits = (float(part.partition("=")[2].strip(",")) for part in str(error.value).split() if "=" in part)
    for budget in (budget_bits(shapes, share, None), budget_bits(shapes, None, bits)):  # what it names suffices
        problem(budget)


def test_what_blocks_must_not_run_across():
    shapes = {"x.q_proj": (64, 96), "x.down_proj": (96, 64), "x.odd": (30, 50)}
    every = list(BLOCKSIZES)
    none = allowed_sizes(shapes, [64, 32, 64, 2048], "none", ARCHITECTURE)
    assert none == {"x.q_proj": [32, 64, 2048], "x.down_proj": [32, 64, 2048], "x.odd": [32, 64]}
    del shapes["x.odd"]
    assert allowed_sizes(shapes, every, "row", ARCHITECTURE) == {"x.q_proj": [32], "x.down_proj": [32, 64]}
    # a head is 16 rows of 96: 1536 weights, 512 · 3
    assert allowed_sizes(shapes, every, "head", ARCHITECTURE)["x.q_proj"] == [32, 64, 128, 256, 512]
    assert allowed_sizes(shapes, every, "head", ARCHITECTURE)["x.down_proj"] == every


BAD = {
    "align": ([64], "column", "quant.align=column: choose none, row, head"),
    "candidate": ([64, 48], "none", "candidates: 48 is not a block size; choose from 32, 64, "),
    "nothing": ([], "none", "candidates is empty; choose from 32, 64, "),
    "too small": ([4096, 2048], "none", "y has 60 weights, less than a block of any of candidates=[4096,2048]: add a"),
    "row": ([64], "row", "quant.align=row: no candidate divides x's 96 weights a row; block sizes that do: 32"),
    "head": ([64], "head", "quant.align=head: no linear of this model is named q_proj, k_proj, v_proj"),
}


@pytest.mark.parametrize("candidates, align, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused(candidates, align, message):
    shapes = {"x": (64, 96), "y": (6, 10)} if "less than" in message else {"x": (64, 96)}
    with pytest.raises(UserError) as error:
        allowed_sizes(shapes, candidates, align, ARCHITECTURE)
    assert message in str(error.value)
