"""Several adapters on one base: attached, activated, detached, and the base the same bit for bit."""

import copy

import pytest
import torch

from modules import (
    adapted_linears,
    adapters,
    attach,
    detach,
    load_adapter,
    parameter_groups,
    save_adapter,
    set_adapter,
    trainable_parameters,
)
from tests.modules.architectures import dense_model, logits, scramble
from tests.modules.baseline_cases import BASELINE_SETTINGS

TWO = ("a", "b")


def with_two(model):
    """`model` with a LoRA adapter "a" on everything and a DoRA adapter "b" on a part, both with an effect."""
    attach(model, "lora", 4, 6, name="a", modules_to_save=["lm_head"])
    scramble(model, 1)
    attach(model, "dora", 3, 6, ["q_proj", "down_proj"], name="b", init="pissa")
    scramble(model, 2)
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_switching_never_touches_the_base(base):
    before, plain = state(base), logits(base)
    model = with_two(base)
    assert adapters(model).keys() == set(TWO) and adapters(model)["b"].adapter == "dora"
    shown = {"b": logits(model)}
    set_adapter(model, "a")
    shown["a"] = logits(model)
    assert len(adapted_linears(model)) == 14 and (shown["a"] - shown["b"]).abs().max() > 1e-2
    set_adapter(model, None)
    assert torch.equal(logits(model), plain)
    assert_equal(state(model), before)
    for name in (*TWO, *TWO):
        set_adapter(model, name)
        assert torch.equal(logits(model), shown[name])
    detach(model, "a")
    assert torch.equal(logits(model), shown["b"]) and adapters(model).keys() == {"b"}
    detach(model, "b")
    assert_equal(state(model), before)
    assert not adapters(model)


def test_detach_makes_the_same_parameters_trainable_again(base):
    frozen = base.model.norm.weight.requires_grad_(False)
    trained = trainable_parameters(base).keys()
    attach(base, "lora", 4)
    assert not any("norm" in name for name in trainable_parameters(base))
    detach(base)
    assert trainable_parameters(base).keys() == trained and not frozen.requires_grad


def test_only_the_active_adapter_trains(base):
    model = with_two(base)
    assert {name.rpartition(".")[2] for name in trainable_parameters(model)} == {"lora_A", "lora_B", "magnitude"}
    set_adapter(model, "a")
    assert {name.rpartition(".")[2] for name in trainable_parameters(model)} == {"lora_A", "lora_B", "weight"}
    model(torch.arange(5)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())
    set_adapter(model, None)
    assert not trainable_parameters(model)


def test_an_adapter_that_is_activated_again_has_the_mode_and_device_of_the_model(base):
    model = with_two(base).train()
    set_adapter(model, "a")
    assert all(module.training for module in model.modules())
    model.eval()
    set_adapter(model, "b")
    assert not any(module.training for module in model.modules())
    model.to("meta")
    set_adapter(model, "a")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_a_copy_has_adapters_of_its_own(base):
    model = with_two(base)
    before = logits(model)
    other = copy.deepcopy(model)
    set_adapter(other, "a")
    scramble(other, 3)
    set_adapter(model, "a")
    assert not torch.equal(logits(model), logits(other))
    set_adapter(other, "b")
    set_adapter(model, "b")
    assert torch.equal(logits(model), before) and torch.equal(logits(other), before)
    detach(other)
    assert adapters(model).keys() == set(TWO)


def test_saved_and_loaded_side_by_side(base, tmp_path):
    model = with_two(base)
    shown = {}
    for name in TWO:
        set_adapter(model, name)
        shown[name] = logits(model)
        save_adapter(model, tmp_path / name)
    set_adapter(model, None)
    save_adapter(model, tmp_path / "again", name="a")  # whether it is shown or not
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "a/adapter_model.safetensors"
    ).read_bytes()
    detach(model)
    for name in TWO:
        load_adapter(model, tmp_path, name)
        assert adapters(model)[name].rank == (4 if name == "a" else 6)  # PiSSA is a plain adapter of twice the rank
    for name in TWO:
        set_adapter(model, name)
        torch.testing.assert_close(logits(model), shown[name], rtol=1e-4, atol=1e-5)


def test_names_that_are_taken_or_not_there(base):
    with pytest.raises(ValueError, match="the model has no adapter 'a'; it has none"):
        set_adapter(base, "a")
    with pytest.raises(ValueError, match="the model has no adapter to detach"):
        detach(base)
    model = with_two(base)
    shown = logits(model)
    with pytest.raises(ValueError, match="the model has an adapter 'a' already: give another name or detach it first"):
        attach(model, "lora", 4, name="a")
    with pytest.raises(ValueError, match="the model has no adapter 'c'; it has a, b"):
        set_adapter(model, "c")
    with pytest.raises(ValueError, match="the model has no adapter 'c'; it has a, b"):
        detach(model, "c")
    with pytest.raises(ValueError, match="v_prj of target_modules matches no linear"):
        attach(model, "lora", 4, target_modules=["v_prj", "q_proj"], name="c")
    assert torch.equal(logits(model), shown), "the active adapter stays active"
    set_adapter(model, None)
    with pytest.raises(ValueError, match="the model has no adapter in use; it has a, b"):
        save_adapter(model, "unused")


def test_parameter_groups(base):
    attach(base, "dora", 4)
    (group,) = parameter_groups(base, 1e-3)
    assert len(group["params"]) == 14 * 3
    slow, fast = parameter_groups(base, 1e-3, loraplus_lr_ratio=16)
    assert (slow["lr"], fast["lr"]) == (1e-3, 1.6e-2)
    assert {p.shape for p in slow["params"]} == {layer.lora_A.shape for layer in adapted_linears(base).values()}
    assert len(fast["params"]) == 14 * 2


def test_they_take_turns_with_others_on_one_base():
    model = dense_model("llama")
    without, found = logits(model), {}
    for adapter, settings in {"lora": {"rank": 2}, **BASELINE_SETTINGS}.items():
        attach(model, adapter, name=adapter, **settings)
        scramble(model)
        found[adapter] = logits(model)
    for adapter in reversed(list(found)):
        set_adapter(model, adapter)
        assert torch.equal(logits(model), found[adapter]), adapter
        set_adapter(model, None)
        assert torch.equal(logits(model), without)
    detach(model)
    assert torch.equal(logits(model), without) and all(p.requires_grad for p in model.parameters())
