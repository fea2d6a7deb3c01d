"""Adapters of one input computed together: a model's results do not change, and what cannot be joined is not."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import kernels
from kernels import use_backend
from kernels.op import interpreting
from modules import attach, fuse, set_adapter
from tests.modules.fused.models import adapted, assert_computes_the_same, loss_and_gradients, pair


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many linears each joint call had."""
    counts, compute = [], kernels.joined_linears

    def counted(x, linears):
        counts.append(len(linears))
        return compute(x, linears)

    monkeypatch.setattr(kernels, "joined_linears", counted)
    return counts


def fused_pair(*args, **settings):
    """(a model, the same fused)"""
    model, joined = pair(*args, **settings)
    fuse(joined)
    return model, joined


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_model_computes_the_same(adapter, calls):
    model, joined = fused_pair(adapter)
    assert_computes_the_same(joined, model)
    assert calls == [3, 2, 3, 2]
    assert joined.state_dict().keys() == model.state_dict().keys()


def test_the_triton_column_joins_too(calls):
    if not (torch.cuda.is_available() or interpreting()):
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    model, joined = (one.to("cuda" if torch.cuda.is_available() else "cpu") for one in fused_pair("lora"))
    with use_backend("triton"):
        assert_computes_the_same(joined, model)
    assert calls == [3, 2, 3, 2]


def test_checkpointing(calls):
    model, joined = fused_pair("dora")
    joined.gradient_checkpointing_enable({"use_reentrant": False})
    assert_computes_the_same(joined, model)
    assert calls == []  # a block that is computed again breaks off when it has what it needs


def test_what_stays_alone(calls):
    _, joined = fused_pair("dora")
    with torch.no_grad():
        joined(input_ids=torch.tensor([[1, 2, 3]]))
    joined.eval()
    joined(input_ids=torch.tensor([[1, 2, 3]]))
    assert calls == []
    loss_and_gradients(fused_pair("dora", dropout=0.5)[1])
    assert calls == []
    with use_backend("reference"):  # which has no kernel to join them
        loss_and_gradients(fused_pair("dora")[1])
    assert calls == []
    loss_and_gradients(fused_pair("dora", Qwen2ForCausalLM, Qwen2Config)[1])  # queries, keys and values have a bias
    assert calls == [2, 2]


def test_hooks_on_linears_are_called(calls):
    _, joined = fused_pair("dora")
    seen, mlp = [], joined.model.layers[0].mlp
    hook = mlp.up_proj.register_forward_hook(lambda *args: seen.append(args))
    loss_and_gradients(joined)
    assert len(seen) == 1 and calls == [3, 3, 2]
    hook.remove()


def test_each_input_has_its_own_results(calls):
    model, joined = fused_pair("dora")
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


def test_a_copy_is_joined_by_itself(calls):
    _, joined = fused_pair("lora")
    copied = copy.deepcopy(joined)
    attention = copied.model.layers[0].self_attn
    assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group
    assert attention.q_proj.group.attention is attention
    loss_and_gradients(copied)
    assert calls == [3, 2, 3, 2]


def test_another_adapter_on_some_of_the_linears(calls):
    """Its query is not of the group, so keys and values are computed alone, until fuse is called again."""
    model = adapted("lora")
    fuse(model)
    attach(model, "lora", 2, name="other", target_modules=["q_proj"])
    model.train()
    loss_and_gradients(model)
    assert calls == []
    set_adapter(model, "default")
    loss_and_gradients(model)
    assert calls == [3, 2, 3, 2]


def test_fusing_again_joins_the_linears_of_an_adapter_that_came_later(calls):
    model = adapted("lora")
    fuse(model)
    attach(model, "dora", 2, name="other")
    loss_and_gradients(model.train())
    assert calls == [2, 2]  # an MLP's are joined without a group
    assert fuse(model) == []
    loss_and_gradients(model)
    assert calls == [2, 2, 3, 2, 3, 2]
    assert isinstance(model, LlamaForCausalLM)
