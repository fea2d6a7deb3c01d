"""Adapters of one input computed together: a model's results do not change, and what cannot be joined is not."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import kernels
from kernels import use_backend
from kernels.op import interpreting
from modules import attach, fuse, set_adapter
from modules.fused.joined import PROJECTIONS
from modules.norms import Norms
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


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_checkpointing(adapter, calls):
    """A block that is computed again breaks off once it has all that backward needs."""
    model, joined = fused_pair(adapter)
    expected = loss_and_gradients(joined)
    calls.clear()
    joined.gradient_checkpointing_enable({"use_reentrant": False})
    got = loss_and_gradients(joined)
    assert calls == [3, 2] * 4
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert_computes_the_same(joined, model)
    for layer in joined.model.layers:
        assert layer.self_attn.q_proj.group.x is None, "tensors of a block are kept"


def test_checkpointed_parts_of_an_attention(calls):
    """Queries in one region, keys and values in another, which both read the same x, or all outside."""
    model, joined = fused_pair("dora")
    attentions = [one.model.layers[0].self_attn for one in (joined, model)]

    def gradients(attention, regions, x):
        x = x.detach().clone().requires_grad_()  # a leaf is the same object when a region is computed again
        results = []
        for names in regions:
            several = lambda x, names=names: [getattr(attention, name)(x).sin() for name in names]  # noqa: E731
            results += checkpoint(several, x, use_reentrant=False) if len(regions) > 1 else several(x)
        parameters = [p for name in PROJECTIONS for p in getattr(attention, name).parameters() if p.requires_grad]
        return torch.autograd.grad(sum(one.square().sum() for one in results), [x, *parameters])

    x = torch.randn(1, 3, 64)
    want = gradients(attentions[1], [PROJECTIONS], x)
    for regions in ([PROJECTIONS], [["q_proj"], ["k_proj", "v_proj"]], [["v_proj"], ["q_proj"], ["k_proj"]]):
        for got, expected in zip(gradients(attentions[0], regions, x), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert set(calls) == {3}


def test_an_op_that_breaks_off_leaves_no_results(calls, monkeypatch):
    _, joined = fused_pair("dora")
    attention, x = joined.model.layers[0].self_attn, torch.randn(1, 3, 64)
    attention.q_proj(torch.randn(1, 3, 64))  # its keys and values are never asked for
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "joined_linears", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attention.q_proj(x)
    assert attention.k_proj.group.x is None
    torch.testing.assert_close(attention.k_proj(x), attention.k_proj._alone(x))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_norms_are_kept_bit_for_bit(checkpointed, calls, monkeypatch):
    """Over two passes, and those that checkpointing adds, each norm is computed once."""
    computed, norm = [], kernels.dora_norm
    monkeypatch.setattr(kernels, "dora_norm", lambda *args: computed.append(None) or norm(*args))
    _, joined = fused_pair("dora")
    if checkpointed:
        joined.gradient_checkpointing_enable({"use_reentrant": False})
    want = loss_and_gradients(joined)
    assert not computed
    with Norms(joined).kept():
        for _ in range(2):
            for got, expected in zip(loss_and_gradients(joined), want, strict=True):
                assert torch.equal(got, expected)
    assert len(computed) == 2 * 7  # linears of two layers
    assert len(calls) == 3 * (8 if checkpointed else 4)


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
