"""The linears against their formulas in float64, and their life in a model: casting, merging, training."""

import copy

import pytest
import torch
from torch import nn

import kernels
from modules import DoRALinear, LoRALinear, NF4Linear
from modules.linear import dense_weight, weight_of

CLASSES = {"lora": LoRALinear, "dora": DoRALinear}


def make_base(quantized: bool, bias: bool, dtype=torch.float32, n_in=70, n_out=52) -> nn.Linear | NF4Linear:
    torch.manual_seed(0)
    linear = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    return NF4Linear.from_linear(linear, blocksize=32) if quantized else linear


def make_adapted(kind: str, base, rank=5, dropout=0.0) -> LoRALinear:
    layer = CLASSES[kind](base, rank, lora_alpha=8, dropout=dropout)
    nn.init.normal_(layer.lora_B, std=0.2)
    if kind == "dora":
        nn.init.uniform_(layer.magnitude, 0.5, 1.5)
    return layer


def expected(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The formula, in float64."""
    w = dense_weight(layer.base).double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    if isinstance(layer, DoRALinear):
        w = layer.magnitude.double()[:, None] * w / w.norm(dim=1, keepdim=True)
    return x.double() @ w.T + (0 if layer.base.bias is None else layer.base.bias.double())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", CLASSES)
def test_forward_and_merge(kind, quantized, bias):
    layer = make_adapted(kind, make_base(quantized, bias))
    x = torch.randn(2, 3, 70)
    y = expected(layer, x)
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-5)
    merged = layer.merge()
    assert type(merged) is nn.Linear and not merged.weight.requires_grad
    torch.testing.assert_close(merged(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", CLASSES)
def test_starts_as_its_base(kind, quantized):
    base = make_base(quantized, bias=True)
    x = torch.randn(4, 70)
    y = base(x)
    torch.testing.assert_close(CLASSES[kind](base, 4, 8.0)(x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_only_the_adapter_trains(kind):
    layer = make_adapted(kind, make_base(quantized=True, bias=True))
    layer(torch.randn(4, 70)).square().sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"lora_A", "lora_B"} | ({"magnitude"} if kind == "dora" else set())
    assert all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", CLASSES)
def test_adapter_stays_fp32_over_a_half_precision_base(kind):
    layer = make_adapted(kind, make_base(quantized=False, bias=True, dtype=torch.bfloat16))
    y = layer(torch.randn(4, 70, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in (layer.lora_A, layer.lora_B)} == {torch.float32}


@pytest.mark.parametrize("kind", CLASSES)
def test_dropout_in_training_only(kind):
    layer = make_adapted(kind, make_base(quantized=True, bias=False), dropout=0.5)
    x = torch.randn(4, 70)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x)), "torch's seed decides the mask"


def test_nf4_linear_is_the_dequantized_linear():
    linear = nn.Linear(70, 52)
    packed = NF4Linear.from_linear(linear, blocksize=64, double_quant=True)
    x = torch.randn(3, 70, requires_grad=True)
    packed(x).sum().backward()
    w = dense_weight(packed)
    torch.testing.assert_close(packed(x), x @ w.T + linear.bias)
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, 70))


def test_nf4_linear_casts_its_computation_but_not_its_constants():
    packed = NF4Linear.from_linear(nn.Linear(70, 52))
    before = copy.deepcopy(packed.state_dict())
    packed.to(torch.float16)
    assert dense_weight(packed).dtype == torch.float16
    after = packed.state_dict()
    for name in ("weight", "absmax", "nested_absmax", "nested_offset"):
        assert torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype, name


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_linear_state_dict_round_trip(double_quant):
    torch.manual_seed(0)
    one = NF4Linear.from_linear(nn.Linear(64, 32), 64, double_quant)
    other = NF4Linear.from_linear(nn.Linear(64, 32), 64, double_quant)
    other.load_state_dict(one.state_dict())
    assert torch.equal(dense_weight(one), dense_weight(other))


def test_storage_is_4_127_bits_a_weight():
    packed = NF4Linear.from_linear(nn.Linear(2048, 1024, bias=False), blocksize=64, double_quant=True)
    bits = 8 * sum(b.numel() * b.element_size() for b in packed.buffers()) / (2048 * 1024)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


@pytest.mark.parametrize("rank", [-1, 0])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is out of range: choose 1 or more"):
        LoRALinear(make_base(quantized=False, bias=False), rank, 8)


def test_a_base_that_another_library_packed_is_refused():
    base = make_base(quantized=False, bias=False).requires_grad_(False)
    base.weight.data = base.weight.data.to(torch.uint8)
    with pytest.raises(ValueError, match=r"the base is a Linear of torch.uint8: only NF4Linear may be packed"):
        LoRALinear(base, 4, 8)


@pytest.mark.parametrize("kind", CLASSES)
def test_repr_names_what_matters(kind):
    text = repr(make_adapted(kind, make_base(quantized=True, bias=False)))
    assert "rank=5" in text and "blocksize=32, double_quant" in text


def test_dora_norm_is_cached_in_evaluation_mode_for_each_version_of_its_inputs(monkeypatch):
    layer, x = make_adapted("dora", make_base(quantized=True, bias=True)), torch.randn(3, 70)
    computed = []
    real = kernels.dora_norm
    monkeypatch.setattr(kernels, "dora_norm", lambda *args: computed.append(args) or real(*args))

    def check(norms: int):
        for _ in range(2):
            torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
        assert len(computed) == norms

    check(0)  # in training mode forward computes its own
    layer.eval()
    check(1)
    with torch.no_grad():
        layer.lora_B.mul_(2)
    check(2)
    layer.scaling *= 2
    check(3)
    layer.lora_A.data.mul_(2)  # which no version tells
    layer.train().eval()
    check(4)
    layer.load_state_dict({name: tensor * 1.5 for name, tensor in layer.state_dict().items() if "lora" in name}, False)
    check(5)


def test_dora_norm_of_a_module_matches_its_merged_weight():
    layer = make_adapted("dora", make_base(quantized=True, bias=False))
    norm = kernels.dora_norm(weight_of(layer.base), layer.norm_sq, layer.lora_A, layer.lora_B, layer.scaling)
    w = dense_weight(layer.base).double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(norm.double(), w.norm(dim=1), rtol=1e-6, atol=1e-6)
