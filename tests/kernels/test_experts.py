"""The linears of experts: forward and every gradient against float64 of each expert, rows and experts left out,
packed weights whose blocks cross experts, contracts, bad input."""

import functools

import pytest
import torch

from kernels import Weight, experts_dora, experts_linear, experts_lora, experts_norm, quantize_4bit
from kernels import weight_norm_sq as norm_sq_of
from kernels.codebook import BLOCK_FORMATS
from kernels.cpu.experts import padded
from kernels.experts import (
    _experts_dora,
    _experts_dora_backward,
    _experts_linear,
    _experts_linear_backward,
    _experts_lora,
    _experts_lora_backward,
    _experts_norm,
)
from kernels.weight import holding
from tests.kernels.experts_cases import CASES, KINDS, SCALING, Shape, make_experts, make_tensors, plain_experts
from tests.kernels.linear_cases import (
    DTYPES,
    assert_as_accurate,
    dropout_seed,
    opcheck,
    randn,
    to_dtype,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("backend")


def norm_sq_3d(weight: Weight) -> torch.Tensor:
    return norm_sq_of(weight.rows()).view(weight.shape[:2])


def make_op(op: str, weight: Weight, shape: Shape, bias=None, **more):
    ends = shape.ends
    if op == "linear":
        return functools.partial(experts_linear, ends=ends, weight=weight, bias=bias)
    given = {"ends": ends, "weight": weight, "bias": bias, "scaling": SCALING, "dropout": shape.p} | more
    given["seed"] = dropout_seed()
    if op == "lora":
        return functools.partial(experts_lora, **given)
    return functools.partial(experts_dora, norm_sq=norm_sq_3d(weight), **given)


# what has been made dense is the same for all ops: one of them is enough for the formats with a scale a block
OPS_OF_CASES = [(op, *case) for op in KINDS for case in CASES if op == "lora" or case[1] not in BLOCK_FORMATS]


@pytest.mark.parametrize(("op", "shape", "kind"), OPS_OF_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_forward_and_gradients_against_float64(dtype, kind, shape, op):
    weight, w = make_experts(kind, shape, dtype)
    tensors, bias, dy = make_tensors(op, shape, dtype)
    got = with_gradients(make_op(op, weight, shape, bias), tensors, dy)
    assert {name: t.dtype for name, t in got.items()} == {"y": dtype, "dx": dtype} | {
        f"d{name}": torch.float32 for name in tensors if name != "x"
    }
    plain = plain_experts(shape, w, bias)
    exact = with_gradients(plain, to_dtype(tensors, torch.float64), dy)
    assert_as_accurate(got, with_gradients(plain, to_dtype(tensors, dtype), dy), exact, dtype)
    for name in ("y", "dx"):
        assert not got[name][shape.tokens - shape.nobody :].any(), f"{name} of rows that belong to nobody"
    for e, rows in enumerate(shape.rows):
        if rows == 0:
            assert not any(got[f"d{name}"][e].any() for name in tensors if name != "x"), "an expert without rows"


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
@pytest.mark.parametrize(("blocksize", "columns", "out"), [(32, 31, 7), (64, 33, 17), (4096, 40, 30), (64, 64, 300)])
def test_a_packed_expert_is_that_part_of_the_whole(blocksize, columns, out, double):
    """With the identity as every expert's rows, y is its dequantized weight, bit for bit: also where blocks, nested
    blocks or bytes cross from one expert into the next."""
    dense = randn(3, out, columns, seed=1) * torch.tensor([1e-2, 1.0, 30.0]).view(3, 1, 1)
    packed, state = quantize_4bit(dense, blocksize, double_quant=double)
    weight = Weight(packed, state)
    x = torch.eye(columns).repeat(3, 1)
    ends = torch.tensor([columns, 2 * columns, 3 * columns], dtype=torch.int32)
    y = experts_linear(x, ends, weight).view(3, columns, out).mT
    assert torch.equal(y, weight.dense(torch.float32))
    for start, end in ((0, 1), (out * columns - 1, out * columns + 1), (2 * out * columns, 3 * out * columns)):
        part, first = holding(weight, start, end)
        want = weight.dense().reshape(-1)[start:end]
        assert torch.equal(part.dense().view(-1)[first : first + end - start], want)


@pytest.mark.parametrize("kind", ["dense", "nf4-double"])
def test_rows_of_a_weight_are_those_of_its_experts(kind):
    shape = Shape((0, 0, 0), columns=33, out=5)
    weight, w = make_experts(kind, shape, torch.float32)
    rows = weight.rows()
    assert rows.shape == (15, 33) and torch.equal(rows.dense(), w.flatten(0, 1))
    assert rows.values.data_ptr() == weight.values.data_ptr()
    torch.testing.assert_close(norm_sq_3d(weight), w.square().sum(2))


@pytest.mark.parametrize(("rank", "columns"), [(1, 96), (3, 33), (16, 128), (64, 96)])
@pytest.mark.parametrize("kind", ["dense", "nf4-double"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_norms_against_float64(dtype, kind, rank, columns):
    shape = Shape((0, 0, 0), columns=columns, out=40, rank=rank)
    weight, w = make_experts(kind, shape, dtype)
    tensors, *_ = make_tensors("dora", shape, dtype)
    lora_A, lora_B = tensors["lora_A"], tensors["lora_B"]
    got = experts_norm(weight, norm_sq_3d(weight), lora_A, lora_B, SCALING)
    assert got.dtype == torch.float32
    exact = (w.double() + SCALING * (lora_B @ lora_A).double()).norm(dim=2)
    at_dtype = (w.to(dtype) + SCALING * (lora_B.to(dtype) @ lora_A.to(dtype))).float().norm(dim=2)
    assert_as_accurate({"norm": got}, {"norm": at_dtype}, {"norm": exact}, dtype)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_a_given_norm_is_taken(p):
    shape = Shape((3, 0), columns=32, out=24, rank=4, p=p)
    weight, _ = make_experts("nf4-double", shape, torch.float32)
    tensors, _, dy = make_tensors("dora", shape, torch.float32)
    norm = experts_norm(weight, norm_sq_3d(weight), tensors["lora_A"], tensors["lora_B"], SCALING)
    computed = with_gradients(make_op("dora", weight, shape), tensors, dy)
    given = with_gradients(make_op("dora", weight, shape, norm=norm), tensors, dy)
    halved = with_gradients(make_op("dora", weight, shape, norm=2 * norm), tensors, dy)
    for name in computed:
        torch.testing.assert_close(given[name], computed[name])
    if not p:
        torch.testing.assert_close(halved["y"], computed["y"] / 2)


def test_a_magnitude_of_zero():
    """y = g ⊙ z holds nothing of z in a column with m = 0, and yet dm is not zero there."""
    shape = Shape((5, 0, 3))
    weight, w = make_experts("nf4", shape, torch.float32)
    tensors, _, dy = make_tensors("dora", shape, torch.float32)
    tensors["magnitude"][:, ::3] = 0
    got = with_gradients(make_op("dora", weight, shape), tensors, dy)
    plain = plain_experts(shape, w, None)
    exact = with_gradients(plain, to_dtype(tensors, torch.float64), dy)
    assert exact["dmagnitude"][0, ::3].abs().min() > 0
    assert_as_accurate(got, with_gradients(plain, tensors, dy), exact, torch.float32)


@pytest.mark.parametrize("op", KINDS)
def test_two_runs_give_the_same_bits(op):
    shape = Shape((40, 0, 3), nobody=3, columns=40, out=24, rank=8, bias=True, p=0.2)
    weight, _ = make_experts("nf4-double", shape, torch.float32)
    tensors, bias, dy = make_tensors(op, shape, torch.float32)
    first, second = (with_gradients(make_op(op, weight, shape, bias), tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", KINDS)
def test_gradients_only_where_they_are_asked_for(op):
    shape = Shape((3, 0), columns=16, out=8, rank=2)
    weight, _ = make_experts("nf4", shape, torch.float32)
    tensors, _, dy = make_tensors(op, shape, torch.float32)
    for wanted in tensors:
        leaves = {name: t.detach().clone().requires_grad_(name == wanted) for name, t in tensors.items()}
        make_op(op, weight, shape)(**leaves).backward(dy)
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


@pytest.mark.parametrize("op", KINDS)
def test_non_contiguous_inputs(op):
    """Also of the weight: gpt-oss keeps its experts transposed."""
    shape = Shape((3, 0), columns=16, out=8, rank=2)
    weight, _ = make_experts("dense", shape, torch.float32)
    turned = Weight(weight.values.mT.contiguous().mT)
    tensors, _, dy = make_tensors(op, shape, torch.float32)
    leaves = {name: t.mT.contiguous().mT.requires_grad_() for name, t in tensors.items()}
    assert not any(t.is_contiguous() for t in (*leaves.values(), turned.values))
    y = make_op(op, turned, shape)(**leaves, ends=shape.ends.repeat_interleave(2)[::2])
    y.backward(dy.t().contiguous().t())
    want = with_gradients(make_op(op, weight, shape), tensors, dy)
    torch.testing.assert_close(y, want["y"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, want[f"d{name}"])


def test_one_factor_for_all_experts():
    """A view of one A [1, rank, in] as that of each expert: its gradient is their sum."""
    shape = Shape((3, 0, 2), columns=32, out=24, rank=4)
    weight, _ = make_experts("nf4", shape, torch.float32)
    tensors, _, dy = make_tensors("dora", shape, torch.float32)
    one = tensors["lora_A"][:1]
    run = make_op("dora", weight, shape)
    leaves = tensors | {"lora_A": one}
    got = with_gradients(lambda lora_A, **others: run(lora_A=lora_A.expand(3, -1, -1), **others), leaves, dy)
    want = with_gradients(run, tensors | {"lora_A": one.repeat(3, 1, 1)}, dy)
    want["dlora_A"] = want["dlora_A"].sum(0, keepdim=True)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_no_rows_at_all():
    shape = Shape((0, 0))
    weight, _ = make_experts("nf4-double", shape, torch.float32)
    for op in KINDS:
        tensors, _, dy = make_tensors(op, shape, torch.float32)
        got = with_gradients(make_op(op, weight, shape), tensors, dy)
        assert got["y"].shape == (0, shape.out) and not any(t.any() for t in got.values())


# ------------------------------------------------------------------------------------ contracts


@pytest.mark.parametrize(("kind", "extras"), [("nf4-double", False), ("dense", True)])
def test_opcheck(kind, extras):
    shape = Shape((2, 0), nobody=1, columns=16, out=8, rank=2)
    weight, _ = make_experts(kind, shape, torch.float32)
    tensors, _, dy = make_tensors("dora", shape, torch.float32)
    x, lora_A, lora_B, magnitude = (t.requires_grad_() for t in tensors.values())
    bias = randn(2, shape.out, seed=5) if extras else None
    p, seed = (0.3, dropout_seed()) if extras else (0.0, None)
    norm_sq = norm_sq_3d(weight)
    norm = experts_norm(weight, norm_sq, lora_A, lora_B, SCALING) if extras else None
    of_lora = (x, shape.ends, weight, lora_A, lora_B, bias, SCALING, p, seed)
    of_dora = (x, shape.ends, weight, norm_sq, norm, lora_A, lora_B, magnitude, bias, SCALING, p, seed)
    opcheck(_experts_linear, x, shape.ends, weight, bias)
    opcheck(_experts_lora, *of_lora)
    opcheck(_experts_dora, *of_dora)
    opcheck(_experts_norm, weight, norm_sq, lora_A.detach(), lora_B.detach(), SCALING)
    opcheck(_experts_linear_backward, dy, shape.ends, weight)
    with torch.no_grad():
        y, xa, norm, gain, z = _experts_dora(*of_dora)
    kept = (None, z) if extras else (y, z)
    x, lora_A, lora_B, magnitude = (t.detach() for t in tensors.values())
    rest = (shape.ends, weight, lora_A, lora_B)
    opcheck(_experts_lora_backward, dy, x, xa, *rest, SCALING, p, seed, extras)
    opcheck(_experts_dora_backward, dy, x, xa, *kept, norm, gain, *rest, magnitude, SCALING, p, seed, extras)


@pytest.mark.parametrize("op", KINDS)
def test_compiles_to_one_graph_forward_and_backward(op):
    shape = Shape((3, 0), nobody=1, columns=16, out=8, rank=2, p=0.0 if op == "linear" else 0.3)
    weight, _ = make_experts("nf4-double", shape, torch.float32)
    tensors, _, dy = make_tensors(op, shape, torch.float32)
    run = make_op(op, weight, shape)
    got = with_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), tensors, dy)
    want = with_gradients(run, tensors, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


@pytest.mark.parametrize("op", KINDS)
def test_meta_device(op):
    shape = Shape((3, 0, 4), bias=True)
    tensors, bias, _ = make_tensors(op, shape, torch.float32)
    leaves = {name: t.to("meta").requires_grad_() for name, t in tensors.items()}
    given = {"ends": shape.ends.to("meta"), "bias": bias.to("meta")}
    given["weight"] = Weight(torch.empty(3, shape.out, shape.columns, device="meta"))
    if op == "linear":
        y = experts_linear(**leaves, **given)
    elif op == "lora":
        y = experts_lora(**leaves, **given, scaling=1.0)
    else:
        y = experts_dora(**leaves, **given, scaling=1.0, norm_sq=norm_sq_3d(given["weight"]))
    assert y.is_meta and y.shape == (7, shape.out)
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


GOOD = {
    **{"x": (7, 64), "ends": (3,), "weight": (3, 48, 64), "lora_A": (3, 4, 64), "lora_B": (3, 48, 4)},
    **{"magnitude": (3, 48), "norm_sq": (3, 48), "norm": (3, 48), "bias": (3, 48)},
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (7, 63)}, r"x \(7, 63\) must be \[rows, in\] of experts of shape \(3, 48, 64\)"),
        ({"x": (1, 7, 64)}, r"x \(1, 7, 64\) must be \[rows, in\]"),
        ({"weight": (48, 64)}, r"the weight of experts \(48, 64\) must be \[experts, out, in\]"),
        ({"ends": (4,)}, r"ends \(4,\) of torch.int32 must be \[3\] of int32: one for each expert"),
        ({"lora_A": (2, 4, 64)}, r"lora_A \(2, 4, 64\).*do not fit 3 experts of shape \(48, 64\)"),
        ({"lora_B": (3, 48, 5)}, r"must be \[experts, rank, in\] and \[experts, out, rank\]"),
        ({"lora_A": (12, 64), "lora_B": (48, 12)}, r"lora_A \(12, 64\).*do not fit 3 experts"),
        ({"magnitude": (48,)}, r"magnitude \(48,\) must be \[3, 48\]"),
        ({"norm_sq": (1,)}, r"norm_sq \(1,\) must be \[3, 48\]"),
        ({"norm": (3, 64)}, r"norm \(3, 64\) must be \[3, 48\]"),
        ({"bias": (48,)}, r"bias \(48,\) must be \[3, 48\]"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_shapes_that_do_not_fit(changed, message):
    t = {name: torch.zeros(shape) for name, shape in (GOOD | changed).items()}
    t["ends"] = t["ends"].int()
    with pytest.raises(ValueError, match=message):
        experts_dora(scaling=1.0, **t)


def test_other_input_that_is_refused(backend):
    t = {name: torch.zeros(GOOD[name]) for name in ("x", "ends", "weight")}
    with pytest.raises(ValueError, match=r"ends \(3,\) of torch.float32 must be \[3\] of int32"):
        experts_linear(**t)
    t["ends"] = t["ends"].int()
    with pytest.raises(ValueError, match=r"x is torch.float64; it must be float32, float16 or bfloat16"):
        experts_linear(t["x"].double(), t["ends"], t["weight"])
    with pytest.raises(ValueError, match=r"x is torch.float16 but the weight is torch.float32"):
        experts_linear(t["x"].half(), t["ends"], t["weight"])
    with pytest.raises(ValueError, match=r"no gradient for their bias: freeze it with requires_grad_\(False\)"):
        experts_linear(**t, bias=torch.zeros(3, 48, requires_grad=True))
    with pytest.raises(RuntimeError, match="gives no gradient for its weight"):
        experts_linear(t["x"], t["ends"], t["weight"].requires_grad_())
    if backend != "triton":  # on a GPU the host does not look at ends
        t["weight"] = t["weight"].detach()
        with pytest.raises(ValueError, match=r"ends\[1\] is 2 after 3"):
            experts_linear(**t | {"ends": torch.tensor([3, 2, 7]).int()})
        with pytest.raises(ValueError, match=r"ends\[2\] is 8 after 2: .* the 7 rows of x"):
            experts_linear(**t | {"ends": torch.tensor([1, 2, 8]).int()})


@pytest.mark.parametrize("op", ["lora", "dora"])
@pytest.mark.parametrize("nobody", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_that_are_computed_with_an_expert_s_own_change_nothing(dtype, nobody, op, backend):
    """Products of 16 bits on a CPU have more rows than an expert: those of the next one, or zeros. Rows of nobody hold
    NaN."""
    if backend == "triton":
        pytest.skip("the Triton kernels add no rows")
    shape = Shape((17, 0, 35, 1, 19), nobody=nobody, columns=40, out=24, rank=4, bias=True, p=0.2)
    weight, w = make_experts("nf4-double", shape, dtype)
    tensors, bias, dy = make_tensors(op, shape, dtype)
    plain = plain_experts(shape, w, bias)
    at_dtype, exact = (with_gradients(plain, to_dtype(tensors, of), dy) for of in (dtype, torch.float64))
    for poisoned in (tensors["x"], dy):
        poisoned[shape.tokens - nobody :] = torch.nan
    got = with_gradients(make_op(op, weight, shape, bias), tensors, dy)
    assert_as_accurate(got, at_dtype, exact, dtype)


def test_rows_are_padded_to_few_numbers_on_a_cpu():
    """Eight numbers between powers of two, at most an eighth more; each number stays itself."""
    for rows in range(1, 5000):
        assert rows <= padded(rows) <= rows * 9 / 8 and padded(padded(rows)) == padded(rows)
    assert len({padded(rows) for rows in range(1025, 2049)}) == 8
