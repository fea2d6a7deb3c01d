"""The DoRA norm once for several passes: the same bits, and never the norm of weights that have changed."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels
from modules import AdamW, DoRALinear, NF4Linear
from modules.norms import Norms


def make(packed: bool, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        base = nn.Linear(64, 64, bias=False, dtype=dtype)
        layers.append(DoRALinear(NF4Linear.from_linear(base) if packed else base, rank=4, lora_alpha=8.0, dropout=0.1))
        nn.init.normal_(layers[-1].lora_B, std=0.1)
    return nn.Sequential(*layers)


@pytest.fixture
def computed(monkeypatch) -> list[None]:
    """Has an element for each norm that was computed by itself."""
    calls, original = [], kernels.dora_norm

    def counted(*args):
        calls.append(None)
        return original(*args)

    monkeypatch.setattr(kernels, "dora_norm", counted)
    return calls


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_steps_are_the_same_bit_for_bit(packed, dtype, backend, computed):
    """Three steps of two accumulated batches each, with checkpointing, beside those that compute each norm."""

    def train(kept: bool, refreshed: bool = False) -> list[torch.Tensor]:
        model = make(packed, dtype).train()
        norms, optimizer = Norms(model), AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        torch.manual_seed(1)
        x = torch.randn(3, 2, 5, 64).to(dtype)
        for group in x:
            if refreshed:
                norms.refresh()
            with norms.used() if refreshed else norms.kept() if kept else torch.enable_grad():
                for batch in group:
                    checkpoint(model, batch, use_reentrant=False).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(layer.kept_norms is None for layer in model) and (refreshed or not norms.values)
        return list(model.parameters())

    with kernels.use_backend(backend):
        plain = train(kept=False)
        assert not computed  # by the op
        kept = train(kept=True)
        assert len(computed) == 3 * 2  # once a step and layer
        refreshed = train(kept=True, refreshed=True)
        assert len(computed) == 2 * 3 * 2
    for a, b, c in zip(plain, kept, refreshed):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_weights_that_change_without_a_version_are_seen():
    """As an optimizer through `.data`, or FSDP's gathering, changes them."""
    model = make(packed=True, dtype=torch.float32).eval()
    x, norms = torch.randn(3, 64), Norms(model)
    for scale in (1.0, 3.0):
        for layer in model:
            layer.lora_B.data.mul_(scale)
        expected = model.eval()(x)
        model.train()
        for layer in model:
            layer.dropout = 0.0
        with norms.kept():
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_evaluation_inside_does_not_use_them():
    model = make(packed=False, dtype=torch.float32).train()
    norms = Norms(model)
    with norms.kept():
        model(torch.randn(2, 64))
        with torch.no_grad():
            model[0].lora_B.mul_(2)
        x = torch.randn(2, 64)
        got = model.eval()[0](x)
    torch.testing.assert_close(got, model[0].merge()(x), rtol=1e-5, atol=1e-5)
