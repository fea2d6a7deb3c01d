"""joined_linears: each result and every gradient against float64 and against lora_linear and dora_linear; contracts."""

import functools

import pytest
import torch
from torch import Tensor

from kernels import Joined, Weight, dora_linear, dora_norm, joined_linears, lora_linear, weight_norm_sq
from kernels.joined import _joined_linears, _joined_linears_backward
from tests.kernels.linear_cases import (
    assert_as_accurate,
    make_base,
    opcheck,
    plain_linear,
    randn,
    to_dtype,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("backend")

SIZES = ((48, 3), (17, 16), (130, 5))  # (out, rank) of each linear
IN, SCALINGS = 64, (1.5, 0.7, 2.0)
ADAPTERS = {"lora": (False,) * 3, "dora": (True,) * 3, "mixed": (True, False, True)}  # which are DoRA's

adapters = pytest.mark.parametrize("dora", ADAPTERS.values(), ids=ADAPTERS)


def make_tensors(dora: tuple[bool, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """(x and the adapters by name, the gradient of the joined outputs)"""
    tensors: dict[str, Tensor] = {"x": randn(2, 5, IN, seed=2, dtype=dtype)}
    for i, (out, rank) in enumerate(SIZES):
        tensors |= {
            f"A{i}": randn(rank, IN, seed=10 + i) / IN**0.5,
            f"B{i}": randn(out, rank, seed=20 + i) / rank**0.5,
        }
        if dora[i]:
            tensors[f"m{i}"] = randn(out, seed=30 + i).abs() + 0.5
            tensors[f"m{i}"][3] = 0
    return tensors, randn(2, 5, sum(out for out, _ in SIZES), seed=6, dtype=dtype)


def make_bases(kinds: tuple[str, ...], dtype: torch.dtype) -> list[tuple[Weight, Tensor]]:
    """(weight, the numbers it stands for in fp32) of each linear"""
    made = (make_base(kind, out, IN, dtype) for kind, (out, _) in zip(kinds, SIZES))
    return [(Weight(values, state), w) for values, state, w in made]


def linears(bases, tensors: dict[str, Tensor]) -> list[Joined]:
    found = []
    for i, ((weight, _), scaling) in enumerate(zip(bases, SCALINGS)):
        magnitude = tensors.get(f"m{i}")
        norm_sq = None if magnitude is None else weight_norm_sq(weight)
        found.append(Joined(weight, tensors[f"A{i}"], tensors[f"B{i}"], scaling, magnitude, norm_sq))
    return found


def joined(bases, x, **adapters):
    return torch.cat(joined_linears(x, linears(bases, adapters)), -1)


def plain(bases, x, **adapters):
    rows = x.flatten(0, -2)
    outputs = [
        plain_linear(rows, w.to(x.dtype), adapters[f"A{i}"], adapters[f"B{i}"], s, None, adapters.get(f"m{i}"))
        for i, ((_, w), s) in enumerate(zip(bases, SCALINGS))
    ]
    return torch.cat(outputs, -1).view(*x.shape[:-1], -1)


def one_by_one(bases, x, **adapters):
    outputs = []
    for one in linears(bases, adapters):
        if one.magnitude is None:
            outputs.append(lora_linear(x, one.weight, one.lora_A, one.lora_B, one.scaling))
        else:
            given = (x, one.weight, one.norm_sq, one.lora_A, one.lora_B, one.magnitude, one.scaling)
            outputs.append(dora_linear(*given))
    return torch.cat(outputs, -1)


@adapters
@pytest.mark.parametrize(
    "kinds", [("dense",) * 3, ("nf4-double",) * 3, ("nf4", "dense", "nf4-double")], ids=["dense", "nf4-double", "mixed"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_forward_and_gradients_against_float64(dtype, kinds, dora):
    (tensors, dy), bases = make_tensors(dora, dtype), make_bases(kinds, dtype)
    got = with_gradients(functools.partial(joined, bases), tensors, dy)
    assert {got[name].dtype for name in ("y", "dx")} == {dtype}
    in_torch = functools.partial(plain, bases)
    exact = with_gradients(in_torch, to_dtype(tensors, torch.float64), dy)
    assert_as_accurate(got, with_gradients(in_torch, to_dtype(tensors, dtype), dy), exact, dtype)


@adapters
@pytest.mark.parametrize("kind", ["dense", "nf4-double"])
def test_each_is_as_the_op_of_one_linear_gives_it(kind, dora):
    (tensors, dy), bases = make_tensors(dora, torch.float32), make_bases((kind,) * 3, torch.float32)
    got = with_gradients(functools.partial(joined, bases), tensors, dy)
    want = with_gradients(functools.partial(one_by_one, bases), tensors, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_with_norms_that_are_known_the_bits_are_the_same(dtype):
    (tensors, dy), bases = make_tensors(ADAPTERS["mixed"], dtype), make_bases(("nf4-double", "nf4", "dense"), dtype)
    tensors["B2"][5] = 0
    bases[2][0].values[5] = 0  # a row of zeros, whose norm is 0
    want = with_gradients(functools.partial(joined, bases), tensors, dy)
    known = []
    for one in linears(bases, tensors):
        given = (one.weight, one.norm_sq, one.lora_A, one.lora_B, one.scaling)
        known.append(None if one.norm_sq is None else dora_norm(*given))
    assert known[2][5] == 0

    def with_norms(x, **adapters):
        given = [one._replace(norm=norm) for one, norm in zip(linears(bases, adapters), known)]
        return torch.cat(joined_linears(x, given), -1)

    got = with_gradients(with_norms, tensors, dy)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@adapters
def test_an_input_that_needs_no_gradient(dora):
    (tensors, dy), bases = make_tensors(dora, torch.float32), make_bases(("nf4-double",) * 3, torch.float32)
    want = with_gradients(functools.partial(joined, bases), tensors, dy)
    x = tensors.pop("x")
    got = with_gradients(lambda **adapters: joined(bases, x, **adapters), tensors, dy)
    for name, gradient in got.items():
        assert torch.equal(gradient, want[name]), name


@adapters
def test_a_result_that_nobody_uses(dora):
    (tensors, dy), bases = make_tensors(dora, torch.float32), make_bases(("dense",) * 3, torch.float32)
    first = SIZES[0][0]
    dy[..., :first] = 0
    want = with_gradients(functools.partial(joined, bases), tensors, dy)
    got = with_gradients(lambda **t: joined(bases, **t)[..., first:], tensors, dy[..., first:])

    def others(x, **adapters):
        return torch.cat(joined_linears(x, linears(bases, adapters))[1:], -1)

    alone = with_gradients(others, tensors, dy[..., first:])
    for name in set(want) - {"y"}:
        torch.testing.assert_close(got[name], want[name])
        torch.testing.assert_close(alone[name], want[name])


def test_opcheck():
    (tensors, _), bases = (
        make_tensors(ADAPTERS["mixed"], torch.float32),
        make_bases(("dense", "nf4", "nf4-double"), torch.float32),
    )
    x = tensors["x"].flatten(0, -2)
    weights, *rest = map(list, zip(*linears(bases, tensors)))
    lora_A, lora_B, scaling, magnitude, norm_sq, norm = rest
    of_dora = magnitude, norm_sq, norm
    args = (x.requires_grad_(), weights, [A.requires_grad_() for A in lora_A], lora_B, *of_dora, scaling)
    opcheck(_joined_linears, *args)
    x, lora_A = x.detach(), [A.detach() for A in lora_A]
    ys, kept = _joined_linears(x, weights, lora_A, lora_B, *of_dora, scaling)
    dys = [randn(*y.shape, seed=i) for i, y in enumerate(ys)]
    for needs_dx in (True, False):
        given = (dys, x, ys, kept, weights, lora_A, lora_B, magnitude, scaling, needs_dx)
        opcheck(_joined_linears_backward, *given)


@adapters
def test_compiles_to_one_graph_forward_and_backward(dora):
    (tensors, dy), bases = make_tensors(dora, torch.float32), make_bases(("dense", "nf4-double", "nf4"), torch.float32)
    op = functools.partial(joined, bases)
    got = with_gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), tensors, dy)
    want = with_gradients(op, tensors, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


@adapters
def test_meta_device(dora):
    tensors, _ = make_tensors(dora, torch.float32)
    leaves = {name: t.to("meta").requires_grad_() for name, t in tensors.items()}
    bases = [(Weight(torch.empty(out, IN, device="meta")), None) for out, _ in SIZES]
    ys = joined_linears(leaves.pop("x"), linears(bases, leaves))
    assert [(y.device.type, y.shape) for y in ys] == [("meta", (2, 5, out)) for out, _ in SIZES]
    sum(y.sum() for y in ys).backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


def test_no_tokens():
    tensors, _ = make_tensors(ADAPTERS["mixed"], torch.float32)
    bases = make_bases(("nf4-double",) * 3, torch.float32)
    A = tensors["A1"].requires_grad_()
    ys = joined_linears(tensors["x"][:, :0], linears(bases, tensors))
    sum(y.sum() for y in ys).backward()
    assert [y.shape for y in ys] == [(2, 0, out) for out, _ in SIZES] and torch.equal(A.grad, torch.zeros_like(A))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_A": (4, 63)}, r"lora_A \(4, 63\).*must be \[rank, in\]"),
        ({"weight": (48, 63)}, r"x \(5, 64\) does not fit a weight of shape \(48, 63\)"),
        ({"magnitude": (47,)}, r"magnitude \(47,\) must be \[48\]"),
        ({"norm": (47,)}, r"norm \(47,\) must be \[48\]"),
        ({"norm_sq": None}, "a DoRA linear needs its magnitude and its norm_sq, a LoRA linear neither"),
        ({"norm_sq": None, "magnitude": None, "norm": (48,)}, "a LoRA linear neither"),
    ],
    ids=["lora_A", "weight", "magnitude", "norm", "norm_sq", "lora-norm"],
)
def test_bad_input(changed, message):
    shapes = {"weight": (48, 64), "lora_A": (4, 64), "lora_B": (48, 4), "magnitude": (48,), "norm_sq": (48,)} | changed
    t = {name: None if shape is None else torch.zeros(shape) for name, shape in shapes.items()}
    t["weight"] = Weight(t["weight"])
    with pytest.raises(ValueError, match=message):
        joined_linears(torch.zeros(5, 64), [Joined(**t, scaling=1.0)])
    with pytest.raises(ValueError, match="joined_linears needs at least one linear"):
        joined_linears(torch.zeros(5, 64), [])
