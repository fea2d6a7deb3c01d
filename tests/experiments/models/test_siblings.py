"""Adapters of one input computed together: a model's results do not change, and what cannot be joined is not."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from experiments.models import siblings
from kernels import shared_input
from modules import attach, quantize

SMALL = {
    **{"vocab_size": 101, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many linears each joint call had."""
    counts, compute = [], shared_input.adapted_linears

    def counted(x, linears, adapters):
        counts.append(len(linears))
        return compute(x, linears, adapters)

    monkeypatch.setattr(siblings, "adapted_linears", counted)
    return counts


def pair(adapter: str, model_class=LlamaForCausalLM, config_class=LlamaConfig, **settings):
    """(a model with adapters that have learned something, the same with siblings joined), both training"""
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL)).requires_grad_(False)
    quantize(model)
    attach(model, adapter, 4, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    other = copy.deepcopy(model)
    siblings.join(other)
    return model.train(), other.train()


def loss_and_gradients(model) -> list[torch.Tensor]:
    input_ids = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # of dropout
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_model_computes_the_same(adapter, calls):
    model, joined = pair(adapter)
    for got, want in zip(loss_and_gradients(joined), loss_and_gradients(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert calls == [3, 2, 3, 2]
    assert joined.state_dict().keys() == model.state_dict().keys()


def test_checkpointing(calls):
    model, joined = pair("dora")
    joined.gradient_checkpointing_enable({"use_reentrant": False})
    for got, want in zip(loss_and_gradients(joined), loss_and_gradients(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert calls == []  # a block that is computed again breaks off when it has what it needs


def test_what_stays_alone(calls):
    _, joined = pair("dora")
    with torch.no_grad():
        joined(input_ids=torch.tensor([[1, 2, 3]]))
    joined.eval()
    joined(input_ids=torch.tensor([[1, 2, 3]]))
    assert calls == []
    loss_and_gradients(pair("dora", dropout=0.5)[1])
    assert calls == []
    loss_and_gradients(pair("dora", Qwen2ForCausalLM, Qwen2Config)[1])  # queries, keys and values have a bias
    assert calls == [2, 2]


def test_each_input_has_its_own_results(calls):
    model, joined = pair("dora")
    attention, alone = joined.model.layers[0].self_attn, model.model.layers[0].self_attn
    x, other = torch.randn(1, 3, 64), torch.randn(1, 3, 64)
    for name, given in (("q_proj", x), ("k_proj", other), ("v_proj", other), ("q_proj", x), ("q_proj", x)):
        torch.testing.assert_close(getattr(attention, name)(given), getattr(alone, name)(given))
    assert calls == [3] * 4
    attention.q_proj(x)
    with torch.no_grad():
        attention.k_proj.lora_B.zero_()
        alone.k_proj.lora_B.zero_()
    torch.testing.assert_close(attention.k_proj(x), alone.k_proj(x))


def test_a_copy_is_joined_by_itself():
    _, joined = pair("lora")
    copied = copy.deepcopy(joined)
    attention = copied.model.layers[0].self_attn
    assert attention.q_proj.siblings.linears == [attention.q_proj, attention.k_proj, attention.v_proj]
    assert attention.k_proj.forward.__self__ is attention.k_proj
