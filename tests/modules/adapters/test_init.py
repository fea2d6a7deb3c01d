"""Each initialisation of A and B against its definition in float64, and against PEFT's."""

import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from torch import nn

from modules import NF4Linear, adapted_linears, attach, decoder_linears, quantize, trainable_parameters
from modules.adapters.init import initialise, principal_inputs
from modules.adapters.quantized_init import quantized_init
from modules.linear import LoRALinear, dense_weight
from tests.modules.architectures import IDS, dense_model, logits, scramble

RANK, ALPHA = 4, 6


def layer_of(base: nn.Module, init: str) -> LoRALinear:
    layer = LoRALinear(base, RANK, ALPHA)
    initialise(layer, init)
    return layer


def base_linear() -> nn.Linear:
    """A linear whose singular values fall as a trained one's do."""
    torch.manual_seed(0)
    linear = nn.Linear(70, 52)
    linear.weight.data *= torch.logspace(0.5, -1, 70)
    return linear


def theirs(init) -> nn.Module:
    """PEFT's layer over the same base."""
    model = get_peft_model(
        nn.Sequential(base_linear()), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=init)
    )
    return model.base_model.model[0]


def product(layer: LoRALinear) -> torch.Tensor:
    return layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()


def test_gaussian():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(4000, 8), RANK, ALPHA)
    initialise(layer, "gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / RANK, rel=0.03) and not layer.lora_B.any()


def test_orthogonal():
    layer = layer_of(base_linear(), "orthogonal")
    assert layer.lora_A.norm() > 0.5 and layer.lora_B.norm() > 0.5 and product(layer).abs().max() < 1e-6


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_a_part_of_the_weight(init):
    base = base_linear()
    w = base.weight.detach().double()
    layer = layer_of(base, init)
    if init == "olora":
        q, r = torch.linalg.qr(w)
        part = layer.scaling * q[:, :RANK] @ r[:RANK]  # PEFT and the paper do not divide by s
    else:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        part = u[:, :RANK] * s[:RANK] @ vt[:RANK]
    torch.testing.assert_close(product(layer), part, rtol=0, atol=1e-4 if "niter" in init else 1e-5)
    x = torch.randn(5, 70)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-5)  # it starts as its base
    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_part_of_the_weight_moves_as_in_peft(init):
    layer, other, x = layer_of(base_linear(), init), theirs(init), torch.randn(5, 70)
    pairs = (layer.lora_A, other.lora_A["default"].weight), (layer.lora_B, other.lora_B["default"].weight)
    for ours, their in pairs:
        torch.testing.assert_close(ours.abs(), their.abs(), rtol=1e-3, atol=1e-4)  # signs are free
        ours.data.add_(0.1)
        their.data.copy_(ours)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    other(x).square().sum().backward()
    for ours, their in pairs:
        torch.testing.assert_close(ours.grad, their.grad, rtol=1e-3, atol=1e-3)


def test_loftq_makes_up_for_what_quantizing_loses():
    model, packed = dense_model("llama"), dense_model("llama")
    dense = {name: linear.weight.detach().double() for name, linear in decoder_linears(model).items()}
    quantize(packed, 64)
    attach(model, "lora", RANK, ALPHA, init="loftq")
    quantize(model, 64)
    for name, layer in adapted_linears(model).items():
        assert torch.equal(layer.base.weight, packed.get_submodule(name).weight), "the base is the plain NF4"
        lost = dense[name] - dense_weight(layer.base).double()
        best = torch.linalg.svdvals(lost.detach())[RANK:].norm()
        assert (lost - product(layer)).norm() == pytest.approx(best.item(), rel=1e-4)
    true = logits(dense_model("llama"))
    assert (logits(model) - true).norm() < (logits(packed) - true).norm()


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("init", ["qpissa", "qpissa_iter_2", "loftq_iter_3"])
def test_the_base_is_packed_for_its_adapter(init, adapter):
    model, once = dense_model("llama"), dense_model("llama")
    dense = {name: linear.weight.detach() for name, linear in decoder_linears(model).items()}
    for each, begin in ((model, init), (once, "loftq")):
        attach(each, adapter, RANK, ALPHA, init=begin, exclude_modules=["v_proj"])
        quantize(each, 64, double_quant=False)
    start, iterations = ("pissa", 5) if init == "qpissa" else (init.partition("_")[0].lstrip("q"), int(init[-1]))
    others = adapted_linears(once)
    for name, layer in adapted_linears(model).items():
        found = quantized_init(dense[name], RANK, start, iterations, 64, False)
        assert torch.equal(layer.base.weight, found.packed) and torch.equal(layer.base.absmax, found.quant_state.absmax)
        left = dense[name].double() - dense_weight(layer.base).double() - product(layer)
        assert left.norm() / dense[name].double().norm() == pytest.approx(found.errors[-1], rel=1e-4)
        other = others[name]
        assert left.norm() < (dense[name].double() - dense_weight(other.base).double() - product(other)).norm()
        if adapter == "dora":  # so that the layer begins where W is, row by row
            torch.testing.assert_close(layer.magnitude, dense[name].norm(dim=1))
            torch.testing.assert_close(layer.norm_sq, dense_weight(layer.base).square().sum(dim=1))
    plain = quantized_init(dense["model.layers.0.self_attn.v_proj"], 1, "loftq", 1, 64, False)
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, plain.packed)


def model_with_structure(architecture: str) -> nn.Module:
    """A model whose hidden states have directions that matter more than others."""
    model = dense_model(architecture)
    embeddings = model.get_input_embeddings().weight
    embeddings.data *= torch.logspace(1.5, -1.5, embeddings.shape[1])
    return model


def batches(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 99, (4, 16), generator=generator)} for _ in range(count)]


def inputs_of(model: nn.Module, name: str, calibration: list[dict]) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in calibration:
            model(**batch)
    hook.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("architecture, count", [("llama", 1), ("llama", 5), ("opt", 3)])
def test_eva_finds_the_principal_components_of_the_inputs(architecture, count):
    model, calibration = model_with_structure(architecture), batches(count)
    names = list(decoder_linears(model))[:8]
    components = principal_inputs(model, dict.fromkeys(names, RANK), calibration)
    for name in names:
        x = inputs_of(model, name, calibration)
        x = x - x.mean(dim=0)
        rows = components[name].double()
        torch.testing.assert_close(rows @ rows.t(), torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-4)
        best = torch.linalg.svdvals(x)[:RANK].norm()
        assert 0.999 < (x @ rows.t()).norm() / best < 1 + 1e-6, name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_eva_spans_what_peft_finds():
    calibration = batches(1)
    config = LoraConfig(
        r=RANK,
        target_modules="all-linear",
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, use_label_mask=False),
    )
    model = get_peft_model(model_with_structure("llama"), config)
    peft.initialize_lora_eva_weights(model, calibration, show_progress_bar=False)
    ours = model_with_structure("llama")
    attach(ours, "lora", RANK, init="eva", calibration=calibration)
    for name, layer in adapted_linears(ours).items():
        lora_A = model.base_model.model.get_submodule(name).lora_A["default"].weight
        overlap = torch.linalg.svdvals(lora_A.detach() @ layer.lora_A.detach().t())  # cosines of the angles between
        assert overlap.min() > 0.99, name
        assert not layer.lora_B.any()


def test_eva_does_not_count_padding():
    model, (batch,) = model_with_structure("llama"), batches(1)
    ids, mask = batch["input_ids"], torch.ones(4, 16, dtype=torch.long)
    padded = {"input_ids": torch.cat([ids, ids[:, :5]], 1), "attention_mask": torch.cat([mask, 0 * mask[:, :5]], 1)}
    ranks = dict.fromkeys(decoder_linears(model), RANK)
    plain, other = principal_inputs(model, ranks, [batch]), principal_inputs(model, ranks, [padded])
    for name in ranks:
        torch.testing.assert_close(plain[name].abs(), other[name].abs(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_frozen_a(adapter):
    model = dense_model("llama")
    attach(model, adapter, RANK, freeze_A=True)
    kinds = {name.rpartition(".")[2] for name in trainable_parameters(model)}
    assert kinds == ({"lora_B"} if adapter == "lora" else {"lora_B", "magnitude"})
    before = logits(model)
    scramble(model)
    assert (logits(model) - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init": "lora_ga"}, "init='lora_ga' is not one of default, gaussian, .*, pissa_niter_N"),
        (
            {"init": "qpissa_iter_0"},
            "init='qpissa_iter_0' is not one of .*, loftq_iter_N, qpissa_iter_N",
        ),
        ({"init": "orthogonal", "rank": 3}, "rank=3 is odd: init=orthogonal needs an even rank"),
        ({"init": "eva"}, "init=eva needs calibration batches"),
        ({"init": "eva", "calibration": []}, "init=eva needs 4 calibration tokens or more; .* saw 0"),
        ({"init": "eva", "calibration": [{"input_ids": IDS[:1, :2]}]}, "init=eva needs 4 calibration tokens or more"),
        ({"calibration": []}, "calibration batches are for init=eva and experts=reached, not init=default"),
    ],
    ids=str,
)
def test_bad_initialisations_are_refused(settings, message):
    model = dense_model("llama")
    with pytest.raises(ValueError, match=message):
        attach(model, "lora", **{"rank": RANK} | settings)
    assert not adapted_linears(model) and all(p.requires_grad for p in model.parameters()), "the model is unchanged"


@pytest.mark.parametrize("init", ["loftq", "qpissa"])
def test_loftq_comes_before_quantizing(init):
    model = dense_model("llama")
    quantize(model)
    with pytest.raises(ValueError, match=rf"init={init} needs .*: attach the adapter before quantize\(model\)"):
        attach(model, "lora", init=init)
    assert all(isinstance(linear, NF4Linear) for linear in decoder_linears(model).values())
