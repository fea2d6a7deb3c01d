"""Attention: definition and CPU kernels against torch's in float64, masks, blocks, rows that see nothing, bad input."""

import pytest
import torch
from torch.nn import functional as F

from kernels import attention
from kernels.cpu import threads
from tests.kernels.op_cases import HALF_ULP, assert_as_accurate, assert_compiles, assert_rounded, with_gradients

SCALE = 0.3
needs_kernels = pytest.mark.skipif(not threads.available(), reason="PyTorch brings no libgomp here")


def inputs(queries: int, keys: int, heads: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (2, queries, heads, 16), (2, keys, groups, 16), (2, keys, groups, 24), (2, queries, heads, 24)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]  # q, k, v, dout as models have them


def masks(kind: str, queries: int, keys: int) -> torch.Tensor | None:
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(2, 1, queries, keys).clone()
    seen[1, :, 1:, 0] = False  # as if padded; no query sees nothing
    if (
        kind == "packed"
    ):  # samples end to end, another split of them in each row, the last token of the first as padding
        samples = torch.tensor([[0] * 20 + [1] * 3 + [2] * (keys - 23), [0] * 5 + [1] * (keys - 6) + [2]])
        return seen & (samples[:, None] == samples[:, :, None])[:, None]
    if kind == "window":
        return seen.triu(keys - queries - 4)
    floats = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"causal": None, "bool": seen, "float": floats}[kind]


def by_torch(mask):
    def run(q, k, v):
        given = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(q, k, v, given, is_causal=mask is None, scale=SCALE, enable_gqa=True)

    return run


@pytest.fixture
def small_blocks(monkeypatch):
    if threads.available():
        from kernels.cpu import attention as cell

        monkeypatch.setattr(cell, "BLOCK", 16)  # 37 queries leave a tail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, groups", [(6, 2), (3, 3)], ids=str)
@pytest.mark.parametrize(
    "kind, queries, keys",
    [("causal", 2, 2), ("causal", 37, 37), ("bool", 37, 37), ("bool", 9, 40), ("float", 37, 37)]
    + [("packed", 37, 37), ("packed", 150, 150), ("window", 90, 100)],
)
def test_against_float64(backend, kind, queries, keys, heads, groups, dtype, small_blocks):
    *tensors, dout = inputs(queries, keys, heads, groups, dtype)
    mask = masks(kind, queries, keys)
    got = with_gradients(lambda q, k, v: attention(q, k, v, mask, SCALE), tensors, dout)
    exact = with_gradients(by_torch(mask), [x.double() for x in tensors], dout)
    torchs = with_gradients(by_torch(mask), tensors, dout)
    for have, want in zip(got, exact):
        assert have.dtype == dtype and have.shape == want.shape
    assert_as_accurate(got, torchs, exact, dtype)


def test_gradients(backend, small_blocks):
    q, k, v, _ = (x.double().requires_grad_() for x in inputs(18, 18, 2, 1, torch.float32))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, None, SCALE), (q[..., :2], k[..., :2], v[..., :2]), fast_mode=True
    )


def test_a_query_that_sees_nothing_is_finite(backend):
    *tensors, dout = inputs(5, 5, 2, 2, torch.float32)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    assert all(x.isfinite().all() for x in with_gradients(lambda *x: attention(*x, mask, SCALE), tensors, dout))


def test_memory_is_as_the_next_linear_reads_it(backend):
    q, k, v, _ = inputs(5, 5, 4, 2, torch.bfloat16)
    assert attention(q, k, v, None, SCALE).transpose(1, 2).is_contiguous()


@needs_kernels
@pytest.mark.parametrize("start", [0, 4])
def test_cpu_softmax(start, number_of_threads):
    from kernels.cpu.attention import probabilities, scores_backward

    heads, queries, keys = 3, 4, 4 + start
    scores = torch.randn(2, heads * queries, keys, generator=torch.Generator().manual_seed(0)) * 5
    dp = torch.randn(2, heads * queries, keys, generator=torch.Generator().manual_seed(1))
    leaf = scores.double().requires_grad_()
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(start + 1).repeat(heads, 1)
    exact = leaf.masked_fill(hidden, -torch.inf).softmax(-1)
    exact.backward(dp.double())
    assert_rounded(probabilities(scores.clone(), queries, start), exact.detach())
    p, ds = scores_backward(scores.clone(), dp, queries, start, 0.5)
    assert_rounded(p, exact.detach())
    assert (2 * ds.double() - leaf.grad).abs().max() <= 2 * HALF_ULP * leaf.grad.abs().max()
    scores[0, 5, 0] = torch.nan
    assert probabilities(scores.clone(), queries, start)[0, 5, 0].isnan()


@needs_kernels
@pytest.mark.parametrize("start", [0, 2])
def test_cpu_softmax_with_a_mask(start, number_of_threads):
    from kernels.cpu.attention import probabilities, scores_backward

    batch, groups, heads, queries, keys = 3, 2, 3, 4, 70
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch, 1, queries + start, keys + 5, generator=generator) < 0.7
    mask[1, 0, start + 2] = False  # sees nothing: every key as much
    scores, dp = (torch.randn(batch * groups, heads * queries, keys, generator=generator) * 3 for _ in range(2))
    leaf = scores.double().requires_grad_()
    seen = mask[:, :, start:, :keys].repeat_interleave(groups, 0).repeat(1, 1, heads, 1).squeeze(1)
    exact = leaf.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
    exact.backward(dp.double())
    assert_rounded(probabilities(scores, queries, start, mask), exact.detach())
    p, ds = scores_backward(scores, dp, queries, start, 1.0, mask)
    assert_rounded(p, exact.detach())
    blind = ~seen.any(-1)
    assert (ds.double() - leaf.grad)[~blind].abs().max() <= 2 * HALF_ULP * leaf.grad.abs().max()


@pytest.mark.parametrize("kind", ["causal", "bool"])
def test_opcheck(kind):
    q, k, v, _ = inputs(5, 5, 4, 2, torch.float32)
    q, k, v = q.unflatten(1, (2, -1)).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    mask = masks(kind, 5, 5)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.qdora.attention.default, (*leaves, mask, SCALE, 2))
    out = torch.randn(2, 5, 2, 2, 24)
    backward = (torch.randn_like(out), q, k, v, mask, out, SCALE)
    torch.library.opcheck(torch.ops.qdora.attention_backward.default, backward)


def test_compiles(backend):
    q, k, v, _ = inputs(5, 5, 4, 2, torch.float32)
    assert_compiles(lambda q, k, v: attention(q, k, v, None, SCALE), q, k, v)


def test_bad_input():
    q, k, v, _ = inputs(5, 4, 4, 2, torch.float32)
    with pytest.raises(ValueError, match="there are 4 keys: give a mask"):
        attention(q, k, v, None, SCALE)
    with pytest.raises(ValueError, match=r"mask \(5, 4\) must be \(2, 1, 5, 4\)"):
        attention(q, k, v, torch.ones(5, 4, dtype=torch.bool), SCALE)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :3], k, v, None, SCALE)
    with pytest.raises(ValueError, match="floats of one dtype"):
        attention(q.half(), k, v, None, SCALE)
