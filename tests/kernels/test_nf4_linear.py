"""nf4_linear: forward and gradients against float64, contracts, bad input."""

import pytest
import torch

from kernels import Weight, nf4_linear, quantize_4bit
from kernels.nf4_linear import _nf4_linear, _nf4_linear_backward
from tests.kernels.linear_cases import (
    DTYPES,
    assert_as_accurate,
    make_base,
    opcheck,
    randn,
    to_dtype,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("backend")

# (x's leading shape, in, out, bias, blocksize)
SHAPES = [
    ((7,), 64, 48, False, 64),
    ((2, 5), 33, 17, True, 32),
    ((1,), 130, 95, True, 4096),
    ((3, 1, 4), 96, 128, False, 128),
    ((64,), 192, 260, True, 64),
]


def shape_id(shape) -> str:
    lead, in_features, out_features, bias, blocksize = shape
    return "-".join(
        ["x".join(map(str, lead)), f"K{in_features}", f"N{out_features}", f"b{blocksize}"] + ["bias"] * bias
    )


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_forward_and_gradients_against_float64(dtype, kind, shape):
    lead, in_features, out_features, bias, blocksize = shape
    packed, state, w = make_base(kind, out_features, in_features, dtype, blocksize)
    tensors = {
        "x": randn(*lead, in_features, seed=2, dtype=dtype),
        "bias": randn(out_features, seed=5) if bias else None,
    }
    dy = randn(*lead, out_features, seed=6, dtype=dtype)

    def op(x, bias):
        return nf4_linear(x, packed, state, bias)

    def plain(x, bias):
        y = x @ w.to(x.dtype).t()
        return y if bias is None else y + bias.to(x.dtype)

    got = with_gradients(op, tensors, dy)
    exact = with_gradients(plain, to_dtype(tensors, torch.float64), dy)
    assert_as_accurate(got, with_gradients(plain, to_dtype(tensors, dtype), dy), exact, dtype)
    assert got["y"].dtype == got["dx"].dtype == dtype


def test_bitsandbytes_linear4bit():
    bnb = pytest.importorskip("bitsandbytes")
    w, bias, x = randn(64, 128, seed=1), randn(64, seed=5), randn(3, 128, seed=2)
    linear = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    linear.load_state_dict({"weight": w, "bias": bias})
    linear = linear.to(torch.get_default_device())  # quantizes
    torch.testing.assert_close(nf4_linear(x, *quantize_4bit(w, 64, double_quant=True), bias), linear(x))


def test_non_contiguous_input():
    packed, state, _ = make_base("nf4", 48, 64, torch.float32)
    x = randn(64, 7, seed=2).t()
    torch.testing.assert_close(nf4_linear(x, packed, state), nf4_linear(x.contiguous(), packed, state))


def test_no_tokens():
    packed, state, _ = make_base("nf4", 48, 64, torch.float32)
    x = torch.zeros(0, 64, requires_grad=True)
    y = nf4_linear(x, packed, state)
    y.sum().backward()
    assert y.shape == (0, 48) and x.grad.shape == (0, 64)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_opcheck(kind):
    base = Weight(*make_base(kind, 48, 64, torch.float32)[:2])
    x, bias = randn(5, 64, seed=2).requires_grad_(), randn(48, seed=5).requires_grad_()
    opcheck(_nf4_linear, x, base, bias)
    opcheck(_nf4_linear_backward, randn(5, 48, seed=3), base)


def test_compiles_to_one_graph_forward_and_backward():
    packed, state, _ = make_base("nf4-double", 48, 64, torch.float32)
    tensors, dy = {"x": randn(5, 64, seed=2)}, randn(5, 48, seed=3)

    def op(x):
        return nf4_linear(x, packed, state)

    got = with_gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), tensors, dy)
    want = with_gradients(op, tensors, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


def test_bad_input():
    packed, state, _ = make_base("nf4", 48, 64, torch.float32)
    x = torch.zeros(5, 64)
    with pytest.raises(ValueError, match=r"x \(5, 63\) does not fit a weight of shape \(48, 64\)"):
        nf4_linear(x[:, :63], packed, state)
    with pytest.raises(ValueError, match=r"x is torch.int64"):
        nf4_linear(x.long(), packed, state)
    with pytest.raises(ValueError, match=r"bias \(64,\) must be \[48\]"):
        nf4_linear(x, packed, state, x[0])
    with pytest.raises(ValueError, match=r"packed: 1535 values"):
        nf4_linear(x, packed[1:], state)
