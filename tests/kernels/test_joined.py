"""Adapted linears of one input together: each as lora_linear and dora_linear give it, gradients against float64."""

import pytest
import torch
from torch import Tensor

from kernels import weight_norm_sq
from kernels.base_weight import base_args
from kernels.shared_input import Linear, adapted_linears
from tests.kernels.linear_cases import assert_as_accurate, make_base, plain_linear, randn, to_dtype, with_gradients

SIZES = ((48, 3), (17, 16), (130, 5))  # (out, rank) of each linear
IN, SCALINGS = 64, (1.5, 0.7, 2.0)


def joined(kind: str, dora: bool, dtype: torch.dtype):
    """(op of x and the adapters by name, the same in plain torch, its tensors, the outputs' gradient)"""
    bases = [make_base(kind, out, IN, dtype) for out, _ in SIZES]
    tensors: dict[str, Tensor] = {"x": randn(2, 5, IN, seed=2, dtype=dtype)}
    for i, (out, rank) in enumerate(SIZES):
        tensors |= {
            f"A{i}": randn(rank, IN, seed=10 + i) / IN**0.5,
            f"B{i}": randn(out, rank, seed=20 + i) / rank**0.5,
        }
        if dora:
            tensors[f"m{i}"] = randn(out, seed=30 + i).abs() + 0.5
            tensors[f"m{i}"][3] = 0

    def op(x, **adapters):
        linears = [
            Linear(base_args(weight, state, x), scaling, weight_norm_sq(weight, state) if dora else None)
            for (weight, state, _), scaling in zip(bases, SCALINGS)
        ]
        given = [(adapters[f"A{i}"], adapters[f"B{i}"], adapters.get(f"m{i}")) for i in range(len(SIZES))]
        return torch.cat(adapted_linears(x, linears, given), -1)

    def plain(x, **adapters):
        rows = x.flatten(0, -2)
        outputs = [
            plain_linear(rows, w.to(x.dtype), adapters[f"A{i}"], adapters[f"B{i}"], s, None, adapters.get(f"m{i}"))
            for i, ((_, _, w), s) in enumerate(zip(bases, SCALINGS))
        ]
        return torch.cat(outputs, -1).view(*x.shape[:-1], -1)

    return op, plain, tensors, randn(2, 5, sum(out for out, _ in SIZES), seed=6, dtype=dtype)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["dense", "nf4-double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_and_gradients_against_float64(dtype, kind, dora):
    op, plain, tensors, dy = joined(kind, dora, dtype)
    got = with_gradients(op, tensors, dy)
    assert {got[name].dtype for name in ("y", "dx")} == {dtype}
    exact = with_gradients(plain, to_dtype(tensors, torch.float64), dy)
    assert_as_accurate(got, with_gradients(plain, to_dtype(tensors, dtype), dy), exact, dtype)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_input_that_needs_no_gradient(dora):
    op, _, tensors, dy = joined("nf4-double", dora, torch.float32)
    want = with_gradients(op, tensors, dy)
    x = tensors.pop("x")
    got = with_gradients(lambda **adapters: op(x, **adapters), tensors, dy)
    for name, gradient in got.items():
        assert torch.equal(gradient, want[name]), name


def test_an_output_that_nobody_uses():
    op, _, tensors, dy = joined("dense", True, torch.float32)
    dy[..., : SIZES[0][0]] = 0
    want = with_gradients(op, tensors, dy)
    got = with_gradients(lambda **t: op(**t)[..., SIZES[0][0] :], tensors, dy[..., SIZES[0][0] :])
    for name in set(got) - {"y"}:
        torch.testing.assert_close(got[name], want[name])
