"""Attention in models: masks, caches, what goes to torch's kernel."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kernels
from kernels import use_backend
from modules import fuse, unfuse
from modules.fused.attention import NAME
from tests.survey.small import build


@pytest.fixture
def models():
    """(with torch's kernel, the same weights with ours)"""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ours = copy.deepcopy(theirs)
    fuse(ours)
    return theirs, ours


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """How many queries each call of ours had."""
    counts, compute = [], kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *args: counts.append(args[0].shape[2]) or compute(*args))
    return counts


def test_in_a_model(models, used):
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
    assert NAME not in models[1].config.to_json_string()


def test_without_a_kernel_it_is_torchs(models, used):
    ids = torch.randint(64, (2, 21))
    with use_backend("reference"):
        models[1](input_ids=ids)
    assert used == []


def test_generation_with_a_static_cache(models):
    ids = torch.randint(64, (1, 7))
    more = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(*(model.generate(ids, **more) for model in models))


def test_eager_attention_stays(models):
    models[0].set_attn_implementation("eager")
    fuse(models[0])
    assert models[0].config._attn_implementation == "eager"
    unfuse(models[0])
    assert models[0].config._attn_implementation == "eager"


def test_a_model_whose_code_asks_for_torchs_by_name_keeps_it():
    """DeepSeek-V3.2 masks keys for `eager` and `sdpa` alone."""
    model = build("deepseek_v32")
    fuse(model)
    assert model.config._attn_implementation == "sdpa"
