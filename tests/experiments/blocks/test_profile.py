"""Profiles of linears against float64: errors of packing, calibration, the predicted rise of the loss."""

import numpy
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import kernels
from experiments.blocks.choice import constant_bits, option_bits, pose, solve
from experiments.blocks.profile import Calibration, Profile, profile_layer, profile_model
from experiments.blocks.trials import Packable
from experiments.data.chat import IGNORED, Example
from experiments.data.samples import collate
from kernels.codebook import BLOCKSIZES
from modules import decoder_linears
from tests.experiments.helpers import tiny
from tests.modules.architectures import dense_model


@pytest.mark.parametrize("shape, dtype", [((48, 64), torch.float32), ((33, 51), torch.bfloat16)])
@pytest.mark.parametrize("double, quant_type", [(True, "nf4"), (False, "nf4"), (True, "fp4")])
def test_a_layer_against_numpy_in_float64(shape, dtype, double, quant_type):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1) ** 3).to(dtype)  # rows of very different sizes
    x, squares = torch.randn(20, shape[1]), torch.rand(shape)
    profile = profile_layer(weight, x.t() @ x, squares, 7, double, quant_type)
    w, x, squares = weight.double().numpy(), x.double().numpy(), squares.double().numpy()
    assert profile.shape == shape and profile.std == pytest.approx(w.std())
    assert profile.kurtosis == pytest.approx(stats.kurtosis(w, axis=None, fisher=False))
    assert profile.outliers == pytest.approx((numpy.abs(w - w.mean()) > 4 * w.std()).mean())
    assert list(profile.sizes) == [size for size in (32, 64, 128, 256, 512, 1024, 2048) if size <= w.size]
    for size, found in profile.sizes.items():
        d = w - kernels.dequantize_4bit(*kernels.quantize_4bit(weight, size, double, quant_type)).double().numpy()
        absmax = numpy.array([numpy.abs(w.ravel()[i : i + size]).max() for i in range(0, w.size, size)])
        assert found["spread"] == pytest.approx(absmax.std() / absmax.mean())
        assert found["error"] == pytest.approx((d**2).sum() / (w**2).sum(), rel=1e-5)
        assert found["output"] == pytest.approx(((x @ d.T) ** 2).sum() / ((x @ w.T) ** 2).sum(), rel=1e-4)
        assert found["fisher"] == pytest.approx(0.5 * (squares * d**2).sum() / 7, rel=1e-5)


def test_calibration_against_autograd_in_float64(samples):
    model, _ = tiny()
    calibration = Calibration(model)
    calibration.see(samples, torch.Generator().manual_seed(5))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    generator = torch.Generator().manual_seed(5)
    exact = tiny()[0].double()
    seen = dict.fromkeys(calibration.linears, 0.0)
    for name, linear in decoder_linears(exact).items():
        linear.register_forward_hook(
            lambda _, args, out, name=name: seen.__setitem__(name, seen[name] + args[0][0].t() @ args[0][0])
        )
    squares, tokens = dict.fromkeys(seen, 0.0), 0
    for sample in samples:
        batch = collate([sample], 0)
        labelled = batch["labels"][0, 1:] != IGNORED
        logits = exact(input_ids=batch["input_ids"]).logits[0, :-1][labelled]
        drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        loss = F.cross_entropy(logits, drawn, reduction="sum")
        weights = {name: linear.weight for name, linear in decoder_linears(exact).items()}
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            squares[name] += gradient**2
        tokens += len(drawn)
    assert calibration.tokens == tokens
    for name in calibration.linears:
        torch.testing.assert_close(calibration.inputs[name].double(), seen[name], rtol=1e-4, atol=1e-4)
        scale = squares[name].abs().max().item()
        torch.testing.assert_close(calibration.squares[name].double(), squares[name], rtol=1e-3, atol=1e-5 * scale)


def test_fisher_predicts_the_divergence_of_a_small_change(samples):
    """½ Σ E[g²] d² over many draws against KL(p‖p′) itself, for changes of independent signs."""
    model, _ = tiny()
    calibration = Calibration(model)
    for seed in range(40):
        calibration.see(samples, torch.Generator().manual_seed(seed))
    name = "model.layers.1.mlp.down_proj"
    weight = decoder_linears(model)[name].weight

    def log_p():
        with torch.no_grad():
            parts = [model(input_ids=torch.tensor([s.input_ids])).logits[0, :-1].double() for s in samples]
        masks = [torch.tensor(s.labels[1:]) != IGNORED for s in samples]
        return torch.cat([part[mask] for part, mask in zip(parts, masks)]).log_softmax(-1)

    before, measured = log_p(), []
    torch.manual_seed(0)
    for _ in range(30):
        change = 1e-3 * torch.randn_like(weight).sign()
        weight.data += change
        after = log_p()
        weight.data -= change
        measured.append((before.exp() * (before - after)).sum(-1).mean().item())
    predicted = 0.5 * 1e-6 * calibration.squares[name].sum().item() / calibration.tokens
    assert numpy.mean(measured) == pytest.approx(predicted, rel=0.15)


def test_gpt2_s_weights_are_profiled_as_out_by_in():
    model = dense_model("gpt2")  # its Conv1D holds [in, out]
    calibration = Calibration(model)
    calibration.see([Example(list(range(20)), list(range(20)))], torch.Generator().manual_seed(0))
    profile = profile_model(calibration, True)["transformer.h.0.attn.c_attn"]
    assert profile.shape == (192, 64) and 0.005 < profile.sizes[64]["output"] < 0.02
    packable = Packable(model, double=True)
    before = model.transformer.h[0].attn.c_attn.weight.clone()
    packable.pack({"transformer.h.0.attn.c_attn": 64})
    difference = model.transformer.h[0].attn.c_attn.weight - before
    assert difference.square().sum() / before.square().sum() == pytest.approx(profile.sizes[64]["error"])


def test_heavy_tails_get_the_smaller_blocks():
    """Weights of one size and one sensitivity: the constants go where large blocks lose the most."""
    rng, layers = numpy.random.default_rng(0), {}
    draws = {"gauss": rng.normal, "laplace": rng.laplace, "student": lambda size: rng.standard_t(3, size=size)}
    for name, draw in draws.items():
        weight = torch.tensor(draw(size=(256, 256)), dtype=torch.float32)
        layers[name] = profile_layer(weight / weight.std(), torch.eye(256), torch.ones(256, 256), 1, True)
    assert layers["gauss"].kurtosis < layers["laplace"].kurtosis < layers["student"].kurtosis
    profile = Profile({}, layers)
    shapes, sizes = profile.shapes, dict.fromkeys(layers, BLOCKSIZES)
    uniform = sum(constant_bits(256 * 256, 64, True) for _ in layers)
    choice = solve(pose(option_bits(shapes, sizes, True, uniform), profile.rises("fisher"), uniform))
    assert choice["student"] < choice["laplace"] <= choice["gauss"] and choice["gauss"] > 64
