"""Attention on a CPU against torch's in float64, and in models: masks, caches, what goes to torch's kernel."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.models import attention as attention_module
from experiments.models.attention import attention, use_on_cpu

SCALE = 0.3


def inputs(queries: int, keys: int, heads: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (2, queries, heads, 16), (2, keys, groups, 16), (2, keys, groups, 24), (2, queries, heads, 24)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]  # q, k, v, dout as models have them


def masks(kind: str, queries: int, keys: int) -> torch.Tensor | None:
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(2, 1, queries, keys).clone()
    seen[1, :, 1:, 0] = False  # as if padded; no query sees nothing
    floats = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"causal": None, "bool": seen, "float": floats}[kind]


def with_gradients(function, q, k, v, dout) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def by_torch(mask):
    def run(q, k, v):
        given = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(q, k, v, given, is_causal=mask is None, scale=SCALE, enable_gqa=True)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, groups", [(6, 2), (3, 3)], ids=str)
@pytest.mark.parametrize(
    "kind, queries, keys", [("causal", 2, 2), ("causal", 37, 37), ("bool", 37, 37), ("bool", 9, 40), ("float", 37, 37)]
)
def test_against_float64(kind, queries, keys, heads, groups, dtype, monkeypatch):
    monkeypatch.setattr(attention_module, "BLOCK", 16)  # 37 queries leave a tail
    tensors, mask = inputs(queries, keys, heads, groups, dtype), masks(kind, queries, keys)
    got = with_gradients(lambda q, k, v: attention(q, k, v, mask, SCALE), *tensors)
    exact = with_gradients(by_torch(mask), *(x.double() for x in tensors))
    torchs = with_gradients(by_torch(mask), *tensors)
    for have, want, theirs in zip(got, exact, torchs):
        assert have.dtype == dtype and have.shape == want.shape
        allowed = 2 * (theirs.double() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (have.double() - want).abs().max() <= allowed


def test_a_query_that_sees_nothing_is_finite():
    q, k, v, dout = inputs(5, 5, 2, 2, torch.float32)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    assert all(x.isfinite().all() for x in with_gradients(lambda *x: attention(*x, mask, SCALE), q, k, v, dout))


@pytest.fixture
def models():
    """(with torch's kernel, the same weights with ours)"""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ours = copy.deepcopy(theirs)
    use_on_cpu(ours)
    return theirs, ours


def test_in_a_model(models, monkeypatch):
    used = []
    monkeypatch.setattr(attention_module, "attention", lambda *args: used.append(args[0].shape[2]) or attention(*args))
    ids = torch.randint(64, (2, 21))
    padded = torch.ones_like(ids)
    padded[0, :6] = 0
    for mask in (None, torch.ones_like(ids), padded):
        theirs, ours = (model(input_ids=ids, attention_mask=mask).logits for model in models)
        kept = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-5)
    assert used == [21] * 6
    texts = [model.generate(ids, attention_mask=padded, max_new_tokens=5, do_sample=False) for model in models]
    assert torch.equal(*texts) and set(used) == {21}  # single queries are torch's
    used.clear()
    models[1].train()
    models[1].config.attention_dropout = models[1].model.layers[0].self_attn.attention_dropout = 0.1
    models[1](input_ids=ids)
    assert used == [21]  # of the two layers that with dropout is torch's
    assert "blocked" not in models[1].config.to_json_string()


def test_eager_attention_stays(models):
    models[0].set_attn_implementation("eager")
    use_on_cpu(models[0])
    assert models[0].config._attn_implementation == "eager"
