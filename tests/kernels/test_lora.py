"""lora_linear: forward and every gradient against float64 and against PEFT, contracts, bad input."""

import pytest
import torch
from torch import nn

from kernels import Weight, lora_linear
from kernels.lora import _lora_linear, _lora_linear_backward
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


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_forward_and_gradients_against_float64(dtype, kind, shape):
    _, in_features, out_features, _, _, p = shape
    weight, state, w = make_base(kind, out_features, in_features, dtype)
    tensors, dy = adapted_tensors(shape, dtype)
    seed = dropout_seed()

    def op(x, lora_A, lora_B, bias):
        return lora_linear(x, weight, lora_A, lora_B, 1.5, bias, state, p, seed)

    def plain(x, lora_A, lora_B, bias):
        return plain_linear(x.flatten(0, -2), w.to(x.dtype), lora_A, lora_B, 1.5, bias, None, p, seed).view_as(dy)

    got = with_gradients(op, tensors, dy)
    assert {name: t.dtype for name, t in got.items()} == {"y": dtype, "dx": dtype} | {
        f"d{name}": torch.float32 for name in ("lora_A", "lora_B", "bias") if tensors[name] is not None
    }
    exact = with_gradients(plain, to_dtype(tensors, torch.float64), dy)
    assert_as_accurate(got, with_gradients(plain, to_dtype(tensors, dtype), dy), exact, dtype)


def test_non_contiguous_inputs():
    weight, state, _ = make_base("nf4", 48, 64, torch.float32)
    tensors, dy = adapted_tensors(SHAPES[0], torch.float32)
    strided = {name: None if t is None else t.t().contiguous().t() for name, t in tensors.items() if t is not None}
    assert not any(t.is_contiguous() for t in strided.values())

    def op(x, lora_A, lora_B):
        return lora_linear(x, weight, lora_A, lora_B, 1.5, quant_state=state)

    leaves = {name: t.requires_grad_() for name, t in strided.items()}  # no clone: it would make them contiguous
    y = op(**leaves)
    y.backward(dy.t().contiguous().t())
    expected = with_gradients(op, {name: tensors[name] for name in leaves}, dy)
    torch.testing.assert_close(y, expected["y"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"d{name}"])


def test_gradients_only_where_they_are_asked_for():
    weight, state, _ = make_base("nf4", 48, 64, torch.float32)
    tensors, dy = adapted_tensors(SHAPES[0], torch.float32)
    x, lora_A, lora_B = tensors["x"], tensors["lora_A"].requires_grad_(), tensors["lora_B"].requires_grad_()
    lora_linear(x, weight, lora_A, lora_B, 1.0, quant_state=state).backward(dy)
    assert x.grad is None and lora_A.grad is not None and lora_B.grad is not None

    x = x.clone().requires_grad_()
    lora_linear(x, weight, lora_A.detach(), lora_B.detach(), 1.0, quant_state=state).backward(dy)
    assert x.grad is not None

    xa = x @ lora_A.t()
    dx, *_ = _lora_linear_backward(dy, x, xa, Weight(weight, state), lora_A, lora_B, 1.0, 0.0, None, False)
    assert dx.numel() == 0, "dx is not computed where x needs no gradient"


def test_a_base_weight_that_wants_a_gradient_is_refused():
    tensors, dy = adapted_tensors(SHAPES[0], torch.float32)
    w = randn(48, 64, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match=r"gives no gradient for its weight: freeze it with requires_grad_\(False\)"):
        lora_linear(tensors["x"], w, tensors["lora_A"], tensors["lora_B"], 1.0).backward(dy)


def test_dropout_draws_its_seed_from_torchs_generator():
    weight, state, _ = make_base("nf4", 48, 64, torch.float32)
    tensors, _ = adapted_tensors(SHAPES[0], torch.float32)

    def run():
        return lora_linear(tensors["x"], weight, tensors["lora_A"], tensors["lora_B"], 1.0, None, state, 0.5)

    torch.manual_seed(1)
    first = run()
    assert not torch.equal(first, run())
    torch.manual_seed(1)
    assert torch.equal(first, run())


# --------------------------------------------------------------------------------------- PEFT


def adapter_weights(layer) -> dict[str, nn.Parameter]:
    return {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_peft_lora_on_a_plain_linear(rslora):
    model, layer = peft_layer(nn.Linear(33, 20), 8, 12, use_rslora=rslora)
    base = layer.get_base_layer()
    x, dy = randn(2, 5, 33, seed=2), randn(2, 5, 20, seed=6)

    def ours(x, lora_A, lora_B):
        return lora_linear(x, base.weight.detach(), lora_A, lora_B, 12 / (8**0.5 if rslora else 8), base.bias.detach())

    compare_with_peft(ours, model, x, dy, adapter_weights(layer))


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
def test_peft_lora_on_a_bitsandbytes_linear(double):
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double)
    w = randn(64, 128, seed=1)
    linear.load_state_dict({"weight": w, "bias": randn(64, seed=5)})
    linear = linear.to(torch.get_default_device())  # quantizes
    model, layer = peft_layer(linear, 8, 16)
    x, dy = randn(2, 5, 128, seed=2), randn(2, 5, 64, seed=6)
    packed, state, _ = quantized_base("nf4-double" if double else "nf4", w)

    def ours(x, lora_A, lora_B):
        return lora_linear(x, packed, lora_A, lora_B, 2.0, linear.bias.detach(), state)

    compare_with_peft(ours, model, x, dy, adapter_weights(layer))


# ---------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize(("kind", "extras"), [("dense", True), ("nf4-double", False), ("nf4-double", True)])
def test_opcheck(kind, extras):
    weight, state, _ = make_base(kind, 48, 64, torch.float32)
    tensors, dy = adapted_tensors(SHAPES[0], torch.float32)
    x, lora_A, lora_B = (tensors[n].requires_grad_() for n in ("x", "lora_A", "lora_B"))
    bias = randn(48, seed=5) if extras else None
    p, seed = (0.3, dropout_seed()) if extras else (0.0, None)
    base = Weight(weight, state)
    opcheck(_lora_linear, x, base, lora_A, lora_B, bias, 1.5, p, seed)
    args = (dy, x.detach(), randn(7, 16, seed=7), base, lora_A.detach(), lora_B.detach(), 1.5, p, seed)
    for needs_dx in (True, False):
        opcheck(_lora_linear_backward, *args, needs_dx)


@pytest.mark.parametrize("kind", ["dense", "nf4-double"])
def test_compiles_to_one_graph_forward_and_backward(kind):
    weight, state, _ = make_base(kind, 48, 64, torch.float32)
    tensors, dy = adapted_tensors(SHAPES[0], torch.float32)
    del tensors["bias"]
    seed = dropout_seed()

    def op(x, lora_A, lora_B):
        return lora_linear(x, weight, lora_A, lora_B, 1.5, None, state, 0.3, seed)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    got, want = with_gradients(compiled, tensors, dy), with_gradients(op, tensors, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


def test_meta_device():
    weight, *_ = make_base("dense", 48, 64, torch.float32)
    tensors, _ = adapted_tensors(SHAPES[0], torch.float32)
    x, lora_A, lora_B = (tensors[n].to("meta").requires_grad_() for n in ("x", "lora_A", "lora_B"))
    y = lora_linear(x, weight.to("meta"), lora_A, lora_B, 1.0, dropout=0.1)
    assert y.device.type == "meta" and y.shape == (7, 48)
    y.sum().backward()
    assert x.grad.shape == x.shape and lora_A.grad.shape == lora_A.shape and lora_B.grad.shape == lora_B.shape


def test_no_tokens():
    weight, state, _ = make_base("nf4-double", 48, 64, torch.float32)
    tensors, _ = adapted_tensors(SHAPES[0], torch.float32)
    lora_A = tensors["lora_A"].requires_grad_()
    y = lora_linear(tensors["x"][:0], weight, lora_A, tensors["lora_B"], 1.0, quant_state=state)
    y.sum().backward()
    assert y.shape == (0, 48) and torch.equal(lora_A.grad, torch.zeros_like(lora_A))


# ---------------------------------------------------------------------------------- bad input

GOOD = {"x": (5, 64), "weight": (48, 64), "lora_A": (4, 64), "lora_B": (48, 4), "bias": (48,)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (5, 63)}, r"x \(5, 63\) does not fit a weight of shape \(48, 64\)"),
        ({"x": ()}, r"x \(\) does not fit"),
        ({"lora_A": (4, 63)}, r"lora_A \(4, 63\).*must be \[rank, in\]"),
        ({"lora_A": (64,)}, r"lora_A \(64,\)"),
        ({"lora_B": (48, 5)}, r"lora_B \(48, 5\).*\[out, rank\]"),
        ({"lora_A": (0, 64), "lora_B": (48, 0)}, r"lora_A \(0, 64\)"),
        ({"weight": (48, 8, 8)}, r"weight of shape \(48, 8, 8\)"),
        ({"bias": (47,)}, r"bias \(47,\) must be \[48\]"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_shapes_that_do_not_fit(changed, message):
    t = {name: torch.zeros(shape) for name, shape in (GOOD | changed).items()}
    with pytest.raises(ValueError, match=message):
        lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], 1.0, t["bias"])


def test_dtypes_that_do_not_fit():
    t = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    with pytest.raises(ValueError, match=r"x is torch.float16 but the weight is torch.float32"):
        lora_linear(t["x"].half(), t["weight"], t["lora_A"], t["lora_B"], 1.0)
    packed, state, _ = make_base("nf4", 48, 64, torch.float32)
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        lora_linear(t["x"].double(), packed, t["lora_A"], t["lora_B"], 1.0, quant_state=state)
    with pytest.raises(ValueError, match=r"packed: 100 values"):
        lora_linear(t["x"], packed[:100], t["lora_A"], t["lora_B"], 1.0, quant_state=state)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_dropout_out_of_range(p):
    t = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    with pytest.raises(ValueError, match=rf"dropout {p}"):
        lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], 1.0, dropout=p)
