"""Adapters on experts against the formula in float64, dense and packed; merge, switch and detach; what is refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from modules import (
    adapted_linears,
    add_weighted_adapter,
    attach,
    decoder_linears,
    dequantize,
    detach,
    load_adapter,
    merge,
    quantize,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unfuse,
    unmerge,
)
from modules.experts import ExpertsLinear, NF4Experts
from modules.fused import compute_mlps_in_parts
from modules.mixtures import take_over_experts
from modules.norms import Norms
from tests.modules.architectures import scramble
from tests.modules.moe_cases import IDS, MODELS, by_formula, experts_of, gradients_by_formula, moe_model, outputs


def adapted(model, adapter="dora", **settings):
    attach(model, adapter, **{"rank": 4, "lora_alpha": 6} | settings)
    scramble(model)
    return model


def gradients(model):
    """Of a loss that weighs all logits, by name."""
    y = outputs(model)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    return y.detach()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_logits_are_those_of_the_formula(kind, adapter, packed):
    plain = moe_model(kind)
    model = copy.deepcopy(plain)
    if packed:
        quantize(model)
    adapted(model, adapter)
    assert experts_of(model)
    want = outputs(by_formula(plain, model))
    assert (want - outputs(plain)).abs().max() > 1e-2
    for training in (False, True):
        torch.testing.assert_close(outputs(model.train(training)).double(), want.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_gradients_are_those_of_the_formula(kind, adapter, packed):
    plain = moe_model(kind)
    model = copy.deepcopy(plain)
    if packed:
        quantize(model)
    adapted(model, adapter)
    exact = by_formula(plain, model)
    gradients(model)
    gradients(exact)
    wanted = gradients_by_formula(model, exact)
    assert wanted.keys() == trainable_parameters(model).keys()
    for name, want in wanted.items():
        assert (model.get_parameter(name).grad - want).norm() < 1e-4 * want.norm(), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_new_adapter_changes_nothing_and_detach_gives_back_the_model(kind):
    model = moe_model(kind)
    before, names, state = outputs(model), [n for n, _ in model.named_parameters()], copy.deepcopy(model.state_dict())
    kinds = {name: type(module) for name, module in model.named_modules()}
    attach(model, "dora", rank=4)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-4)
    scramble(model)
    detach(model)
    assert torch.equal(outputs(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_experts_that_are_taken_over_keep_the_names_of_the_state(kind):
    model = moe_model(kind)
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    take_over_experts(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    scrambled = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(scrambled)
    assert all(torch.equal(tensor, scrambled[name]) for name, tensor in model.state_dict().items())
    lacking = {name: tensor for name, tensor in state.items() if not name.endswith("experts.down_proj")}
    with pytest.raises(RuntimeError, match=r"experts\.down_proj"):
        model.load_state_dict(lacking)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_merged_models_compute_the_same_and_transformers_loads_them(tmp_path, kind, adapter):
    model = moe_model(kind)
    quantize(model)
    base = copy.deepcopy(model)
    adapted(model, adapter)
    want = outputs(model)
    report = merge(model)
    assert any("experts" in path for path in report)
    torch.testing.assert_close(outputs(model), want, rtol=2e-4, atol=2e-4)
    unmerge(model)
    assert torch.equal(outputs(model), want)
    set_adapter(model, None)
    assert torch.equal(outputs(model), outputs(base))
    set_adapter(model, "default")
    merge(model, unload=True, report=False)
    assert not any(isinstance(module, ExpertsLinear | NF4Experts) for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(outputs(loaded), want, rtol=2e-4, atol=2e-4)


def test_packed_experts_are_one_tensor_and_unpack_to_the_same():
    model = moe_model("gpt_oss")
    quantize(model)
    packed = {name: linear for name, linear in decoder_linears(model).items() if isinstance(linear, NF4Experts)}
    assert len(packed) == 4 and all(linear.quant_state.nested for linear in packed.values())
    before = outputs(model)
    dequantize(model)
    assert not any(isinstance(module, NF4Experts) for module in model.modules())
    assert torch.equal(outputs(model), before)


def test_adapters_are_switched_and_added_up():
    model = moe_model("mixtral")
    adapted(model, "lora")
    first = outputs(model)
    attach(model, "dora", rank=2, name="second", target_modules=["experts"])
    scramble(model, 2)
    assert set(adapted_linears(model)) == set(experts_of(model))
    second = outputs(model)
    assert (first - second).abs().max() > 1e-2
    set_adapter(model, "default")
    assert torch.equal(outputs(model), first)
    add_weighted_adapter(model, {"default": 1.0}, "sum")
    torch.testing.assert_close(outputs(model), first, rtol=1e-4, atol=1e-4)
    detach(model, "sum")
    set_adapter(model, "second")
    assert torch.equal(outputs(model), second)


@pytest.mark.parametrize(
    "targets, exclude, experts, others",
    [
        ("all-linear", None, 4, 8),
        (["experts"], None, 4, 0),
        (["gate_up_proj"], None, 2, 0),
        (["q_proj", "down_proj"], None, 2, 2),
        ("all-linear", ["experts"], 0, 8),
        (r".*layers\.1\.mlp\.experts\..*", None, 2, 0),
    ],
)
def test_targets(targets, exclude, experts, others):
    model = moe_model("qwen3_moe")
    attach(model, "lora", rank=2, target_modules=targets, exclude_modules=exclude)
    assert len(experts_of(model)) == experts and len(adapted_linears(model)) == experts + others
    assert not any(name.endswith(("gate.weight", "router.weight")) for name in trainable_parameters(model))


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_inits(init):
    model = moe_model("qwen3_moe")
    before = outputs(model)
    attach(model, "lora", rank=4, init=init)
    torch.testing.assert_close(outputs(model), before, rtol=2e-4, atol=2e-4)
    for layer in experts_of(model).values():
        if init in ("pissa", "olora"):
            w = layer.base.weight[1]
            update = layer.scaling * layer.lora_B[1] @ layer.lora_A[1]
            u, s, vt = torch.linalg.svd(w)
            want = (u[:, :4] * s[:4]) @ vt[:4] if init == "pissa" else None
            if want is not None:
                torch.testing.assert_close(update, want, rtol=1e-3, atol=1e-4)
            else:
                assert torch.linalg.matrix_rank(update) == 4


@pytest.mark.parametrize("init", ["loftq", "qpissa_iter_1", "eva"])
def test_inits_that_are_not_for_experts_are_refused(init):
    model = moe_model("qwen3_moe")
    calibration = {"calibration": [{"input_ids": IDS}]} if init == "eva" else {}
    with pytest.raises(ValueError, match=rf"init={init} is not for experts, .*exclude_modules=\[experts\]"):
        attach(model, "lora", rank=4, init=init, **calibration)
    attach(model, "lora", rank=4, init=init, exclude_modules=["experts"], **calibration)


def test_bad_settings_are_refused_by_name():
    model = moe_model("qwen3_moe")
    with pytest.raises(ValueError, match=r"experts.* which this adapter is not for"):
        attach(model, "houlsby", rank=4)
    with pytest.raises(ValueError, match=r"target_modules.*w1"):
        attach(model, "lora", rank=4, target_modules=["w1"])
    with pytest.raises(ValueError, match=r"rank 33 is out of range: .*experts.down_proj can have 1 to 32"):
        attach(model, "lora", rank=33, target_modules=["down_proj"])


def test_dropout_on_experts_trains_and_is_off_in_evaluation():
    model = adapted(moe_model("qwen3_moe"), dropout=0.5)
    still = outputs(model)
    model.train()
    torch.manual_seed(3)
    first = outputs(model)
    torch.manual_seed(3)
    assert torch.equal(outputs(model), first) and not torch.equal(first, still)


def test_norms_that_are_kept_are_those_of_the_weights():
    model = adapted(moe_model("qwen3_moe")).train()
    want = outputs(model)
    norms = Norms(model)
    with norms.kept():
        assert torch.equal(outputs(model), want) and torch.equal(outputs(model), want)
        assert any(norm.dim() == 2 for norm in norms.values.values())


def test_biases_of_experts_stay_frozen():
    model = moe_model("gpt_oss")
    attach(model, "lora", rank=2, bias="all")
    trained = trainable_parameters(model)
    assert any(name.endswith("q_proj.bias") for name in trained)
    assert not any("experts" in name and "bias" in name for name in trained)


def test_experts_that_train_whole():
    """modules_to_save: the weights themselves train, and have the gradients of transformers' own code."""
    model = moe_model("qwen3_moe")
    plain = copy.deepcopy(model).requires_grad_(True)
    attach(model, "lora", rank=2, target_modules=["q_proj"], modules_to_save=["gate_up_proj"])
    gradients(model)
    gradients(plain)
    trained = {name: p for name, p in trainable_parameters(model).items() if "experts" in name}
    assert len(trained) == 2
    for name, parameter in trained.items():
        want = plain.get_parameter(name.removesuffix(".weight")).grad
        assert (parameter.grad - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_chosen_experts_alone_are_adapted(tmp_path, kind, adapter):
    plain = moe_model(kind)
    model = copy.deepcopy(plain)
    attach(model, adapter, rank=4, experts=[2, 0])
    scramble(model)
    for layer in experts_of(model).values():
        assert layer.lora_A.shape[0] == layer.lora_B.shape[0] == 2 and layer.chosen.tolist() == [0, 2]
        lora_A, lora_B = layer.factors()
        assert not lora_A[[1, 3]].any() and not lora_B[[1, 3]].any() and lora_B[[0, 2]].any()
    want = outputs(model)
    torch.testing.assert_close(want.double(), outputs(by_formula(plain, model)), rtol=2e-4, atol=2e-4)
    gradients(model)
    assert all(parameter.grad.any() for parameter in trainable_parameters(model).values())
    merge(model)
    base = {name: layer.base for name, layer in model._adapters.named["default"].modules.items() if "experts" in name}
    for name, linear in base.items():
        merged = model.get_submodule(name).weight
        assert torch.equal(merged[[1, 3]], linear.weight[[1, 3]]) and not torch.equal(merged, linear.weight)
    unmerge(model)
    save_adapter(model, tmp_path)
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(outputs(again), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_experts_share_a_factor(factor):
    plain = moe_model("qwen3_moe")
    model = copy.deepcopy(plain)
    attach(model, "dora", rank=4, shared_factor=factor)
    scramble(model)
    for layer in experts_of(model).values():
        assert getattr(layer, f"lora_{factor}").shape[0] == 1
    torch.testing.assert_close(outputs(model).double(), outputs(by_formula(plain, model)), rtol=2e-4, atol=2e-4)
    gradients(model)
    for layer in experts_of(model).values():
        assert getattr(layer, f"lora_{factor}").grad.any()


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_experts_that_calibration_reaches(kind):
    model = moe_model(kind)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("gate", "router")):
            module.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out))
    batch = {"input_ids": IDS[:, :2], "attention_mask": torch.tensor([[1, 0], [1, 1]])}
    attach(model, "lora", rank=2, experts="reached", calibration=[batch])
    for name, layer in experts_of(model).items():
        [out] = next(seen[gate] for gate in seen if gate.split(".")[2] == name.split(".")[2])[:1]
        # the router's choice for tokens 0, 2 and 3; token 1 is padding
        chosen = out[2][[0, 2, 3]] if kind == "qwen3_moe" else out[1][[0, 2, 3]].topk(2).indices
        assert layer.chosen.tolist() == sorted(set(chosen.flatten().tolist())), name
    assert any(len(layer.chosen) < layer.base.num_experts for layer in experts_of(model).values())


def test_experts_that_no_token_comes_to_get_no_adapter():
    model = moe_model("qwen3_moe")
    model.model.layers[1].mlp.forward = lambda x: x  # a layer that is passed over
    names = attach(model, "lora", rank=2, experts="reached", calibration=[{"input_ids": IDS}])
    assert len(experts_of(model)) == 2 and not any("layers.1.mlp.experts" in name for name in names)


@pytest.mark.parametrize("kind, router", [("qwen3_moe", "gate"), ("gpt_oss", "router"), ("llama4_text", "router")])
def test_routers_stay_frozen_unless_they_are_named(kind, router):
    model = moe_model(kind)
    attach(model, "lora", rank=2)
    assert not any(f".{router}." in name for name in trainable_parameters(model))
    detach(model)
    attach(model, "lora", rank=2, modules_to_save=[router])
    gradients(model)
    named = [p for name, p in trainable_parameters(model).items() if f".{router}." in name]
    assert len(named) >= 2 and all(p.grad.any() for p in named)


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"experts": [0, 4]}, "experts: 4 is not one of the 4"),
        ({"experts": []}, "give different whole numbers"),
        ({"experts": [1, 1]}, "give different whole numbers"),
        ({"experts": "some"}, "give different whole numbers, as in .*, or reached"),
        ({"experts": "reached"}, "experts=reached needs calibration batches"),
        ({"experts": [0], "target_modules": ["q_proj"]}, "none of the adapted linears has theirs"),
        ({"shared_factor": "C"}, "shared_factor='C' is not one of none, A, B"),
        ({"shared_factor": "A", "init": "pissa"}, "init=pissa starts each expert's A and B"),
    ],
)
def test_bad_choices_of_experts_are_refused(settings, error):
    model = moe_model("qwen3_moe")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=error):
        attach(model, "lora", rank=2, **settings)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_experts_in_parts_give_the_same(kind):
    model = moe_model(kind)
    quantize(model)
    adapted(model)
    want = gradients(model)
    grads = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    names = compute_mlps_in_parts(model, 7)
    assert any(name.endswith("experts") for name in names)
    torch.testing.assert_close(gradients(model), want, rtol=1e-4, atol=1e-4)
    for name, parameter in trainable_parameters(model).items():
        assert (parameter.grad - grads[name]).norm() <= 1e-4 * grads[name].norm()
    unfuse(model)
    assert torch.equal(outputs(model), want)
