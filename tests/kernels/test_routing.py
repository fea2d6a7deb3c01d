"""route, gather and combine against a loop over tokens in float64; tokens without an expert; repeatability."""

import pytest
import torch

from kernels import combine, gather, route
from kernels.routing import _combine, _combine_backward, _gather
from tests.kernels.linear_cases import DTYPES, opcheck, randn
from tests.kernels.op_cases import assert_as_accurate, with_gradients

pytestmark = pytest.mark.usefixtures("backend")


def indices(tokens: int, k: int, experts: int, seed: int = 0) -> torch.Tensor:
    """k different experts of each token."""
    return randn(tokens, experts, seed=seed).topk(k, 1).indices


@pytest.mark.parametrize("k", range(1, 9))
def test_rows_are_sorted_and_stable(k):
    index = indices(13, k, 9, seed=k)
    order, ends = route(index, 9)
    assert (order.dtype, ends.dtype) == (torch.int64, torch.int32)
    pairs = [(int(e), i) for i, e in enumerate(index.flatten())]
    assert order.tolist() == [i for _, i in sorted(pairs)]
    assert ends.tolist() == [sum(e <= expert for e, _ in pairs) for expert in range(9)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_pairs_of_nobody_come_last(dtype):
    index = torch.tensor([[4, 1], [0, 7], [-1, 1]], dtype=dtype)
    order, ends = route(index, 4)
    assert ends.tolist() == [1, 3, 3, 3]
    assert order.tolist()[:3] == [2, 1, 5] and sorted(order.tolist()[3:]) == [0, 3, 4]
    assert route(index[:0], 4)[1].tolist() == [0, 0, 0, 0]


def by_hand(index, experts, dtype):
    """A mixture whose expert e multiplies by e + 1 and adds nothing for the experts of others."""

    def mixture(x, weights):
        rows = []
        for t in range(len(x)):
            of_token = [weights[t, j] * x[t] * (e + 1) for j, e in enumerate(index[t].tolist()) if e < experts]
            rows.append(sum(of_token, torch.zeros_like(x[t])))
        return torch.stack(rows).to(dtype)

    return mixture


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_mixture_against_float64(dtype, k):
    experts = 9
    index = indices(11, k, experts + 2, seed=k)  # the last two are somebody else's
    x, weights, dy = randn(11, 24, seed=1, dtype=dtype), randn(11, k, seed=2), randn(11, 24, seed=3, dtype=dtype)

    def ours(x, weights):
        order, ends = route(index, experts)
        expert = torch.searchsorted(ends, torch.arange(len(order)), right=True)
        factor = torch.where(expert < experts, expert + 1, 0).to(dtype)
        return combine(gather(x, order, k) * factor.unsqueeze(1), order, weights)

    got = with_gradients(ours, (x, weights), dy)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32]
    exact = with_gradients(by_hand(index, experts, torch.float64), (x.double(), weights.double()), dy)
    at_dtype = with_gradients(by_hand(index, experts, dtype), (x, weights.to(dtype)), dy)
    assert_as_accurate(got, at_dtype, exact, dtype)
    again = with_gradients(ours, (x, weights), dy)
    assert all(torch.equal(one, two) for one, two in zip(got, again))


def test_sums_are_in_fp32():
    """In fp16, 1 + 2⁻¹³ is 1, however often it is added."""
    order, _ = route(torch.arange(8).view(1, 8), 8)
    y = torch.full((8, 2), 2.0**-13).half()
    y[0] = 1.0
    assert torch.equal(combine(y, order, torch.ones(1, 8)), torch.full((1, 2), 1 + 7 * 2.0**-13).half())


@pytest.mark.parametrize(("tokens", "size"), [(0, 8), (1, 1), (9, 1100)])
def test_sizes(tokens, size):
    """No tokens, one number, more columns than a program's."""
    index, weights = indices(tokens, 2, 3), randn(tokens, 2, seed=2)
    x = randn(tokens, size, seed=1).requires_grad_()
    order, _ = route(index, 3)
    out = combine(gather(x, order, 2), order, weights)
    out.sum().backward()
    torch.testing.assert_close(out, x * weights.sum(1, keepdim=True))
    torch.testing.assert_close(x.grad, weights.sum(1, keepdim=True).expand(tokens, size))


def test_opcheck():
    order, _ = route(indices(3, 2, 4), 4)
    x, y, weights = randn(3, 8, seed=1), randn(6, 8, seed=2), randn(3, 2, seed=3)
    opcheck(_gather, x.requires_grad_(), order, 2)
    opcheck(_combine, y.requires_grad_(), order, weights.requires_grad_(), 2)
    opcheck(_combine_backward, randn(3, 8, seed=4), y.detach(), order, weights.detach())


def test_compiles_to_one_graph():
    index, x, weights = indices(6, 2, 4), randn(6, 8, seed=1), randn(6, 2, seed=2)

    def mixture(x, weights):
        order, _ = route(index, 4)
        return combine(gather(x, order, 2), order, weights)

    leaves, dy = (x, weights), torch.ones(6, 8)
    got = with_gradients(torch.compile(mixture, fullgraph=True, backend="aot_eager"), leaves, dy)
    for one, two in zip(got, with_gradients(mixture, leaves, dy)):
        torch.testing.assert_close(one, two)


def test_bad_input():
    with pytest.raises(ValueError, match=r"top_k_index \(4,\) of torch.int64 must be integers \[tokens, k\]"):
        route(torch.zeros(4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"x \(3, 5\) and order \(4,\) must be \[tokens, size\] and \[tokens · 2\]"):
        gather(torch.zeros(3, 5), torch.arange(4), 2)
    with pytest.raises(ValueError, match=r"y \(4, 5\), order \(4,\) and weights \(3, 2\) must be"):
        combine(torch.zeros(4, 5), torch.arange(4), torch.zeros(3, 2))
