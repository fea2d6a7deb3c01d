"""Whose rotary function a model calls, and that transformers' own comes back."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

import kernels
from modules import fuse, unfuse
from modules.fused import rotary
from tests.modules.fused.models import small
from tests.survey.small import build

THEIRS = getattr(modeling_llama.apply_rotary_pos_emb, "own", modeling_llama.apply_rotary_pos_emb)


@pytest.fixture(autouse=True)
def nothing_fused(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", THEIRS)
    monkeypatch.setattr(rotary, "_fused", {})


def test_of_a_model(monkeypatch):
    model = small()
    fuse(model)
    ours = modeling_llama.apply_rotary_pos_emb
    assert ours.own is THEIRS
    fuse(model)
    assert modeling_llama.apply_rotary_pos_emb is ours  # once
    called = []
    monkeypatch.setattr(kernels, "rotary", lambda *args, **kwargs: called.append(args) or THEIRS(*args, **kwargs))
    model(input_ids=torch.arange(6).unsqueeze(0))
    assert len(called) == 2
    model.to(torch.bfloat16).model.rotary_emb.register_forward_hook(lambda *args: tuple(x.float() for x in args[2]))
    with pytest.raises(RuntimeError):  # their own takes several dtypes, and this model then does not
        model(input_ids=torch.arange(6).unsqueeze(0))
    assert len(called) == 2


def test_the_last_model_gives_the_function_back():
    first, second = small(), small()
    fuse(first)
    fuse(second)
    unfuse(first)
    assert modeling_llama.apply_rotary_pos_emb.own is THEIRS
    unfuse(second)
    assert modeling_llama.apply_rotary_pos_emb is THEIRS
    unfuse(second)


def test_another_formula_is_told_apart():
    """GLM turns neighbours, and half of the dimensions only."""
    assert not rotary._gives_the_same_bits(modeling_glm.apply_rotary_pos_emb)


def test_models_that_turn_a_part_of_each_head_call_their_own():
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, rope_parameters=rope))
    ids = torch.arange(6).unsqueeze(0)
    want = model.eval()(input_ids=ids).logits
    fuse(model)
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
    model.to(torch.bfloat16)(input_ids=ids).logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    unfuse(model)


def test_models_that_turn_queries_alone_call_their_own():
    model, ids = build("qwen4_exp_text"), torch.arange(6).unsqueeze(0)
    want = model(input_ids=ids).logits
    fuse(model)
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
    unfuse(model)
