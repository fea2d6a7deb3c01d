"""dora_linear and dora_norm: forward and every gradient against float64 and PEFT, degenerate rows, contracts."""

import functools

import pytest
import torch
from torch import nn

from kernels import Weight, dora_linear, dora_norm, weight_norm_sq
from kernels.dora import _dora_linear, _dora_linear_backward, _dora_norm, _weight_norm_sq
from tests.kernels.linear_cases import (
    BASES,
    DTYPES,
    SHAPES,
    adapted_tensors,
    assert_as_accurate,
    compare_with_peft,
    dropout_seed,
    make_base,
    opcheck,
    peft_layer,
    plain_linear,
    quantized_base,
    randn,
    shape_id,
    to_dtype,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("backend")


def make_tensors(shape, dtype: torch.dtype):
    tensors, dy = adapted_tensors(shape, dtype)
    return tensors | {"magnitude": randn(shape[2], seed=8).abs() + 0.5}, dy


def make_op(weight, state, p: float = 0.0, scaling: float = 1.5):
    norm_sq, seed = weight_norm_sq(weight, state), dropout_seed()

    def op(x, lora_A, lora_B, magnitude, bias=None):
        return dora_linear(x, weight, norm_sq, lora_A, lora_B, magnitude, scaling, bias, state, p, seed)

    return op


def make_plain(w, p: float = 0.0, scaling: float = 1.5):
    def plain(x, lora_A, lora_B, magnitude, bias=None):
        y = plain_linear(x.flatten(0, -2), w.to(x.dtype), lora_A, lora_B, scaling, bias, magnitude, p, dropout_seed())
        return y.view(*x.shape[:-1], -1)

    return plain


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_forward_and_gradients_against_float64(dtype, kind, shape):
    _, in_features, out_features, _, _, p = shape
    weight, state, w = make_base(kind, out_features, in_features, dtype)
    tensors, dy = make_tensors(shape, dtype)
    got = with_gradients(make_op(weight, state, p), tensors, dy)
    assert {name: t.dtype for name, t in got.items()} == {"y": dtype, "dx": dtype} | {
        f"d{name}": torch.float32 for name, t in tensors.items() if name != "x" and t is not None
    }
    plain = make_plain(w, p)
    exact = with_gradients(plain, to_dtype(tensors, torch.float64), dy)
    assert_as_accurate(got, with_gradients(plain, to_dtype(tensors, dtype), dy), exact, dtype)


# ------------------------------------------------------------------------- rows that degenerate


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_magnitude_of_zero(dtype, shape):
    """y = g ⊙ z holds nothing of z in a column with m = 0, and yet dm = Σ dy ⊙ z / ‖·‖ is not zero there."""
    _, in_features, out_features, _, _, p = shape
    weight, state, w = make_base("nf4", out_features, in_features, dtype)
    tensors, dy = make_tensors(shape, dtype)
    tensors["magnitude"][::3] = 0
    got = with_gradients(make_op(weight, state, p), tensors, dy)
    plain = make_plain(w, p)
    exact = with_gradients(plain, to_dtype(tensors, torch.float64), dy)
    assert exact["dmagnitude"][::3].abs().min() > 0
    assert_as_accurate(got, with_gradients(plain, to_dtype(tensors, dtype), dy), exact, dtype)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_row_of_zeros_is_finite(dtype, kind, p):
    """A weight row of zeros whose B row is zero has norm 0: y is 0 there, whatever the magnitude, never NaN."""
    w = randn(48, 64, seed=1, dtype=dtype)
    w[5] = w[40] = 0
    weight, state, _ = quantized_base(kind, w)
    tensors, dy = make_tensors(((7,), 64, 48, 16, False, p), dtype)
    tensors["lora_B"][5] = tensors["lora_B"][40] = 0
    tensors["magnitude"][5] = 0
    tensors["magnitude"][40] = 100
    got = with_gradients(make_op(weight, state, p), {n: t for n, t in tensors.items() if t is not None}, dy)
    for name, value in got.items():
        assert value.isfinite().all(), name
    if kind != "nf4-double":  # which stores an absmax of zero as a small number
        assert not got["y"][:, [5, 40]].any() and not got["dmagnitude"][[5, 40]].any()


@pytest.mark.parametrize("residue", [0.0, 1e-4, 1e-2], ids=lambda v: f"residue{v}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_norm_of_rows_that_cancel(dtype, residue):
    """s·BA ≈ -W in every fourth row: what is left must not lose its digits, nor rows without cancellation theirs."""
    s = 2.0
    lora_A, lora_B = randn(8, 96, seed=3, dtype=dtype).float(), randn(40, 8, seed=4, dtype=dtype).float()
    w = randn(40, 96, seed=9, dtype=dtype)
    w[::4] = (-s * (lora_B[::4] @ lora_A) * (1 + residue)).to(dtype)
    exact = (w.double() + s * (lora_B.double() @ lora_A.double())).norm(dim=1)
    got = dora_norm(w, weight_norm_sq(w), lora_A, lora_B, s).double()
    # W itself is rounded: what it leaves of sBA is noise of a few units in its last place
    floor = 2 * torch.finfo(torch.float32).eps * w.double().norm(dim=1)
    allowed = max(1e-4, torch.finfo(dtype).eps) * exact + floor
    assert ((got - exact).abs() <= allowed).all()


@pytest.mark.parametrize("rank", [1, 3, 16, 33, 64])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_norm_against_float64(dtype, kind, rank):
    weight, state, w = make_base(kind, 40, 96, dtype)
    lora_A, lora_B = randn(rank, 96, seed=3), randn(40, rank, seed=4)
    norm_sq = weight_norm_sq(weight, state)
    got = dora_norm(weight, norm_sq, lora_A, lora_B, 0.5, state)
    assert got.dtype == norm_sq.dtype == torch.float32
    exact = {"norm_sq": w.double().square().sum(1), "norm": (w.double() + 0.5 * (lora_B @ lora_A).double()).norm(dim=1)}
    wd, ad, bd = w.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
    at_dtype = {"norm_sq": wd.float().square().sum(1), "norm": (wd + 0.5 * (bd @ ad)).float().norm(dim=1)}
    assert_as_accurate({"norm_sq": norm_sq, "norm": got}, at_dtype, exact, dtype)


# ------------------------------------------------------------------------------------- autograd


def test_non_contiguous_inputs():
    weight, state, _ = make_base("nf4", 48, 64, torch.float32)
    tensors, dy = make_tensors(SHAPES[0], torch.float32)
    del tensors["bias"]
    op = make_op(weight, state)
    leaves = {n: t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for n, t in tensors.items()}
    assert not any(t.is_contiguous() for t in leaves.values())
    for t in leaves.values():
        t.requires_grad_()
    y = op(**leaves)
    y.backward(dy.t().contiguous().t())
    expected = with_gradients(op, tensors, dy)
    torch.testing.assert_close(y, expected["y"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"d{name}"])


def test_gradients_only_where_they_are_asked_for():
    weight, state, _ = make_base("nf4", 48, 64, torch.float32)
    tensors, dy = make_tensors(SHAPES[0], torch.float32)
    del tensors["bias"]
    op = make_op(weight, state)
    for wanted in tensors:
        leaves = {name: t.detach().clone().requires_grad_(name == wanted) for name, t in tensors.items()}
        op(**leaves).backward(dy)
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_a_given_norm_is_taken(backend, p):
    """With the norm of another B in the place of the right one, y is that of a magnitude scaled by their quotient."""
    weight, state, _ = make_base("nf4-double", 48, 64, torch.float32)
    tensors, dy = make_tensors(SHAPES[0], torch.float32)
    del tensors["bias"]
    norm_sq = weight_norm_sq(weight, state)
    right, other = (dora_norm(weight, norm_sq, tensors["lora_A"], s * tensors["lora_B"], 1.5, state) for s in (1, 3))
    op = functools.partial(dora_linear, weight=weight, norm_sq=norm_sq, scaling=1.5, quant_state=state, dropout=p)
    seed = dropout_seed() if p else None
    got = with_gradients(functools.partial(op, norm=other, seed=seed), tensors, dy)
    want = with_gradients(
        functools.partial(op, seed=seed), tensors | {"magnitude": tensors["magnitude"] * right / other}, dy
    )
    want["dmagnitude"] *= right / other
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_a_base_weight_that_wants_a_gradient_is_refused():
    tensors, dy = make_tensors(SHAPES[0], torch.float32)
    w = randn(48, 64, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match=r"gives no gradient for its weight: freeze it with requires_grad_\(False\)"):
        make_op(w, None)(**tensors).backward(dy)


# ----------------------------------------------------------------------------------------- PEFT


def dora_weights(layer) -> dict[str, nn.Parameter]:
    return {
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
        "magnitude": layer.lora_magnitude_vector["default"].weight,
    }


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_peft_dora_on_a_plain_linear(bias):
    model, layer = peft_layer(nn.Linear(33, 20, bias=bias), 8, 12, use_dora=True)
    base = layer.get_base_layer()
    op = make_op(base.weight.detach(), None, scaling=1.5)
    with torch.no_grad():  # away from its start, where g = 1
        layer.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.5, 2, 20))

    def ours(x, lora_A, lora_B, magnitude):
        return op(x, lora_A, lora_B, magnitude, base.bias.detach() if bias else None)

    compare_with_peft(ours, model, randn(2, 5, 33, seed=2), randn(2, 5, 20, seed=6), dora_weights(layer))


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
def test_peft_dora_on_the_dequantized_weight(double):
    """PEFT's own QDoRA over bitsandbytes 0.50 on a CPU reads the packed weight wrongly in eval mode, so the reference
    is PEFT's DoRA on a plain linear that holds the dequantized weight."""
    packed, state, w = make_base("nf4-double" if double else "nf4", 48, 64, torch.float32)
    base = nn.Linear(64, 48, bias=False)
    base.weight = nn.Parameter(w, requires_grad=False)
    model, layer = peft_layer(base, 8, 12, use_dora=True)
    compare_with_peft(
        make_op(packed, state), model, randn(2, 5, 64, seed=2), randn(2, 5, 48, seed=6), dora_weights(layer)
    )


# ------------------------------------------------------------------------------------ contracts


@pytest.mark.parametrize(("kind", "extras"), [("dense", True), ("nf4-double", False), ("nf4-double", True)])
def test_opcheck(kind, extras):
    weight, state, _ = make_base(kind, 48, 64, torch.float32)
    tensors, dy = make_tensors(SHAPES[0], torch.float32)
    x, lora_A, lora_B, magnitude = (tensors[n].requires_grad_() for n in ("x", "lora_A", "lora_B", "magnitude"))
    bias = randn(48, seed=5) if extras else None
    p, seed = (0.3, dropout_seed()) if extras else (0.0, None)
    base, norm_sq = Weight(weight, state), weight_norm_sq(weight, state)
    norm = dora_norm(weight, norm_sq, lora_A, lora_B, 1.5, state) if extras else None
    forward = (x, base, norm_sq, norm, lora_A, lora_B, magnitude, bias, 1.5, p, seed)
    opcheck(_dora_linear, *forward)
    opcheck(_dora_norm, base, norm_sq, lora_A.detach(), lora_B.detach(), 1.5)
    opcheck(_weight_norm_sq, base)

    with torch.no_grad():
        y, xa, norm, gain, z = _dora_linear(*forward)
    kept = (None, z) if extras else (y, z)
    adapter = (t.detach() for t in (lora_A, lora_B, magnitude))
    backward = (dy, x.detach(), xa, *kept, norm, gain, base, *adapter, 1.5, p, seed)
    for needs_dx in (True, False):
        opcheck(_dora_linear_backward, *backward, needs_dx)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", ["dense", "nf4-double"])
def test_compiles_to_one_graph_forward_and_backward(kind, p):
    weight, state, _ = make_base(kind, 48, 64, torch.float32)
    tensors, dy = make_tensors(SHAPES[0], torch.float32)
    del tensors["bias"]
    op = make_op(weight, state, p)
    got = with_gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), tensors, dy)
    want = with_gradients(op, tensors, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


def test_meta_device():
    tensors, _ = make_tensors(((2, 5), 33, 17, 3, True, 0.1), torch.float32)
    leaves = {name: t.to("meta").requires_grad_() for name, t in tensors.items()}
    w = torch.empty(17, 33, device="meta")
    y = dora_linear(leaves.pop("x"), w, weight_norm_sq(w), scaling=1.0, dropout=0.1, **leaves)
    assert y.device.type == "meta" and y.shape == (2, 5, 17)
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


def test_no_tokens():
    weight, state, _ = make_base("nf4-double", 48, 64, torch.float32)
    tensors, _ = make_tensors(SHAPES[0], torch.float32)
    magnitude = tensors["magnitude"].requires_grad_()
    y = make_op(weight, state)(tensors["x"][:0], tensors["lora_A"], tensors["lora_B"], magnitude)
    y.sum().backward()
    assert y.shape == (0, 48) and torch.equal(magnitude.grad, torch.zeros_like(magnitude))


GOOD = {"x": (5, 64), "lora_A": (4, 64), "lora_B": (48, 4), "magnitude": (48,), "norm_sq": (48,), "norm": (48,)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (5, 63)}, r"x \(5, 63\) does not fit a weight of shape \(48, 64\)"),
        ({"lora_A": (4, 63)}, r"lora_A \(4, 63\).*must be \[rank, in\]"),
        ({"lora_B": (48, 5)}, r"lora_B \(48, 5\).*\[out, rank\]"),
        ({"magnitude": (64,)}, r"magnitude \(64,\).*must be \[48\]"),
        ({"norm_sq": (1,)}, r"norm_sq \(1,\) must be \[48\]"),
        ({"norm": (1,)}, r"norm \(1,\) must be \[48\]"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_shapes_that_do_not_fit(changed, message):
    t = {name: torch.zeros(shape) for name, shape in (GOOD | changed).items()}
    with pytest.raises(ValueError, match=message):
        dora_linear(weight=torch.zeros(48, 64), scaling=1.0, **t)


def test_norm_checks_its_shapes():
    w = torch.zeros(48, 64)
    with pytest.raises(ValueError, match=r"lora_A \(4, 64\) and lora_B \(64, 4\) do not fit"):
        dora_norm(w, weight_norm_sq(w), torch.zeros(4, 64), torch.zeros(64, 4), 1.0)
    with pytest.raises(ValueError, match=r"norm_sq \(64,\) must be \[48\]"):
        dora_norm(w, torch.zeros(64), torch.zeros(4, 64), torch.zeros(48, 4), 1.0)


def test_fp16_sums_of_the_magnitude_gradient_do_not_overflow():
    dy, x, xa = torch.full((100, 3), 30.0, dtype=torch.float16), torch.zeros(100, 8).half(), torch.zeros(100, 1).half()
    w, lora_A, lora_B, ones = torch.zeros(3, 8).half(), torch.zeros(1, 8), torch.zeros(3, 1), torch.ones(3)
    rest = (ones, ones, Weight(w), lora_A, lora_B, ones, 1.0, 0.0, None, False)  # norm, gain, …, magnitude, …
    dm = _dora_linear_backward(dy, x, xa, dy, x.new_empty(0), *rest)[3]  # y is dy: dm = Σ dy² / m
    assert torch.equal(dm, torch.full((3,), 90000.0))  # fp16 ends at 65504
