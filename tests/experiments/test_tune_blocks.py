"""tune_blocks and try_maps on the tiny model: profiles against float64, maps that runs read, what is refused."""

import csv
import json
import math

import numpy
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import kernels
from experiments import run, try_maps, tune_blocks
from experiments.blocks.choice import constant_bits, option_bits, pose, solve
from experiments.blocks.profile import Calibration, Profile, profile_layer, profile_model, read_profile
from experiments.blocks.quant_map import read_map
from experiments.blocks.trials import Losses, Packable, measure
from experiments.config import DataConfig, ModelConfig
from experiments.data.chat import IGNORED, Example
from experiments.data.samples import collate, load_data
from experiments.models.load import load_model
from experiments.training.evaluation import evaluate
from kernels.codebook import BLOCKSIZES
from modules import decoder_linears, quantize
from tests.experiments.conftest import SMALL, write_chats
from tests.experiments.conftest import TINY as TINY_RUN
from tests.modules.architectures import dense_model

TINY = ModelConfig(name="tiny", source="tiny")


def tiny():
    return load_model(TINY, torch.float32, seed=0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = write_chats(tmp_path_factory.mktemp("chats"))
    return load_data(DataConfig(name="jsonl", source="jsonl", path=str(path)), tiny()[1]).train[:3]


@pytest.fixture
def command(terminal, tmp_path, chats):
    given = ["model=tiny", "data=jsonl", f"data.path={chats}", "dtype=float32", f"output_dir={tmp_path / 'out'}"]
    return lambda module, *overrides: terminal(module, *given, *overrides)


@pytest.fixture
def tuned(command, tmp_path):
    """The folder that tune_blocks wrote, and what it printed."""
    code, text = command(tune_blocks, "samples=6", "bits=4.13", "candidates=[32,64,128,2048]")
    assert code == 0, text
    return tmp_path / "out", text


# ------------------------------------------------------------------------------------- profiles


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


# ----------------------------------------------------------------------------------- tune_blocks


def test_the_map_is_read_by_a_run(tuned, terminal, chats, tmp_path):

    folder, text = tuned
    quant_map = read_map(folder / "map.yaml")
    assert quant_map.double and set(quant_map.blocksizes.values()) <= {32, 64, 128, 2048}
    assert "greedy" in text and "tuned" in text and "predicted rise" in text and str(folder / "map.yaml") in text
    constants = sum(constant_bits(math.prod(quant_map.shapes[n]), b, True) for n, b in quant_map.blocksizes.items())
    weights = sum(map(math.prod, quant_map.shapes.values()))
    assert 4 + constants / weights <= 4.13
    what = ["+method=qlora", *SMALL, "trainer.steps=1", "quant=tuned", f"quant.map={folder / 'map.yaml'}"]
    code, text = terminal(run, *TINY_RUN, *what, "data=jsonl", f"data.path={chats}", f"output_dir={tmp_path / 'run'}")
    assert code == 0, text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["bits_per_weight"] == pytest.approx(4 + constants / weights)  # counted on the packed model


def test_another_budget_needs_no_new_profile(tuned, command, tmp_path, monkeypatch):
    folder, _ = tuned
    monkeypatch.setattr(tune_blocks, "load_model", None)
    profile = f"profile={folder / 'profile.csv'}"
    for overrides in (["bits=4.13", "candidates=[32,64,128,2048]"], ["sensitivity=output", "quant.align=head"]):
        code, text = command(tune_blocks, profile, *overrides, f"output_dir={tmp_path / 'again'}")
        assert code == 0, text
        again = read_map(tmp_path / "again" / "map.yaml")
        assert (again == read_map(folder / "map.yaml")) is ("bits=4.13" in overrides), overrides
    assert again.blocksizes["model.layers.0.self_attn.q_proj"] <= 1024  # a head's 16 rows of 64
    code, text = command(tune_blocks, profile, "quant.align=row", f"output_dir={tmp_path / 'again'}", "budget=0.07")
    assert code == 0 and set(read_map(tmp_path / "again" / "map.yaml").blocksizes.values()) <= {32, 64, 128}


BAD = {
    "budget": (["budget=0.0001"], "the smallest possible is budget=0.00"),
    "bits": (["bits=3.9"], "the budget is 0: the smallest possible is budget="),
    "share": (["budget=1.5"], "budget=1.5 is a share of the codes' bytes: choose one between 0 and 1"),
    "both": (["budget=0.05", "bits=4.2"], "budget=0.05 and bits=4.2 are two budgets: choose one"),
    "candidate": (["candidates=[64,100]"], "candidates: 100 is no block size; choose from 32, 64, 128"),
    "too small": (["candidates=[4096]"], "k_proj has 2048 weights, less than a block of any of candidates=[4096]: add"),
    "sensitivity": (["sensitivity=hessian"], "sensitivity=hessian: choose fisher or output"),
    "align": (["quant.align=rows"], "quant.align=rows: choose none, row, head"),
    "samples": (["samples=0"], "samples=0: choose 1 or more"),
    "no profile": (["profile=/nowhere"], "profile=/nowhere: No such file or directory: leave profile out to measure"),
    "another model": (
        ["model=smollm2", "profile={profile}"],
        "is of model=tiny, not smollm2: set it so, or",
    ),
    "another double": (
        ["quant.double=false", "profile={profile}"],
        "is of quant.double=true, not false: set it so",
    ),
    "another type": (["quant.type=fp4", "profile={profile}"], "is of quant.type=nf4, not fp4: set it so"),
    "no type": (["quant.type=nf3"], "quant.type=nf3: choose nf4, fp4, int4"),
    "no CSV": (["profile={map}"], "is no profile that tune_blocks wrote: "),
    "misspelt": (["budgett=0.05"], "Key 'budgett' not in 'TuneConfig'"),
    "preset": (["model=gpt3-175b"], "model=gpt3-175b has shapes for experiments.plan but no weights"),
}


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory):
    """profile.csv and map.yaml of the tiny model."""
    folder = tmp_path_factory.mktemp("profile")
    cfg = tune_blocks.TuneConfig(
        model=TINY, data=DataConfig(name="arithmetic", source="arithmetic"), samples=2, candidates=[32, 64],
        output_dir=str(folder), bits=4.2, dtype="float32",
    )  # fmt: skip
    tune_blocks.tune(cfg)
    return folder


@pytest.mark.parametrize("overrides, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, profile_file, tmp_path, overrides, message):
    files = {"profile": profile_file / "profile.csv", "map": profile_file / "map.yaml"}
    code, text = command(tune_blocks, "samples=1", *(override.format(**files) for override in overrides))
    assert code == 1 and message in text and "Traceback" not in text, text
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_packed_model_is_refused(terminal, packed_tiny, tmp_path):
    code, text = terminal(tune_blocks, "model=hf", f"model.path={packed_tiny}", f"output_dir={tmp_path / 'out'}")
    assert code == 1 and "q_proj is packed in NF4 already: block sizes are chosen for a dense model" in text


# -------------------------------------------------------------------------------------- try_maps


def test_losses_are_those_of_the_packed_model(samples):
    model, tokenizer = tiny()
    exact = measure(model, samples, 2, tokenizer.pad_token_id)
    packable = Packable(model, double=True)
    sizes = {name: (32, 64)[i % 2] for i, name in enumerate(packable.linears)}
    packable.pack(sizes)
    losses = measure(model, samples, 2, tokenizer.pad_token_id)
    packed = tiny()[0]
    quantize(packed, sizes)
    assert losses.mean == pytest.approx(evaluate(packed, samples, 2, tokenizer.pad_token_id).loss, rel=1e-6)
    assert losses.above(exact)[0] == pytest.approx(losses.mean - exact.mean)
    packable.pack({})
    assert measure(model, samples, 2, tokenizer.pad_token_id).mean == exact.mean


def test_the_standard_error_is_that_of_independent_samples():
    rng = numpy.random.default_rng(0)
    tokens = rng.integers(1, 30, size=200)
    common, means = rng.normal(size=200), []  # of a sample's tokens alike: they are not independent
    losses = [Losses(tokens * (mean + common), tokens) for mean in (0.3, 0.0)]
    assert losses[0].above(losses[1]) == pytest.approx((0.3, 0.0), abs=1e-12)
    for _ in range(400):
        noise = rng.normal(size=200)
        means.append(Losses(tokens * noise, tokens).above(Losses(0.0 * tokens, tokens)))
    differences, errors = zip(*means)
    assert numpy.mean(errors) == pytest.approx(numpy.std(differences), rel=0.1)


def test_trials(command, profile_file, tmp_path):
    code, text = command(
        try_maps, f"profile={profile_file / 'profile.csv'}", f"maps=[{profile_file / 'map.yaml'}]", "budget=0.05",
        "candidates=[32,64,1024]", "alone=[128]", "data.max_heldout=3", "data@second=arithmetic", "second.max_heldout=3"
    )  # fmt: skip
    assert code == 0, text
    rows = {row["title"]: row for row in csv.DictReader((tmp_path / "out" / "trials.csv").open())}
    assert list(rows) == [
        "dense", "all 32", "all 64", "all 1024", "tuned as 32", "tuned as 64", "tuned as 1024", "tuned, budget", "map",
        *(f"only {kind}_proj 128" for kind in ("q", "k", "v", "o", "gate", "up", "down")),
    ]  # fmt: skip
    for size in (32, 64, 1024):
        tuned, uniform = rows[f"tuned as {size}"], rows[f"all {size}"]
        assert float(tuned["bits_per_weight"]) <= float(uniform["bits_per_weight"]) and tuned["beside"] == str(size)
        assert float(tuned["predicted_fisher"]) <= float(uniform["predicted_fisher"])
        difference = float(tuned["loss_arithmetic"]) - float(uniform["loss_arithmetic"])
        assert float(tuned["above_arithmetic"]) == pytest.approx(difference, abs=1e-9)
    assert float(rows["tuned, budget"]["bits_per_weight"]) <= 4.2
    assert (tmp_path / "out" / "trials.png").stat().st_size > 10_000
    assert read_map(tmp_path / "out" / "map_as_64.yaml").double
    assert "Spearman" in text and "tuned as 64" in text
    profile = read_profile(profile_file / "profile.csv")
    assert list(profile.layers) == list(decoder_linears(tiny()[0]))


def test_trials_without_a_profile_are_refused(command, tmp_path):
    code, text = command(try_maps)
    assert code == 1 and "no profile: python -m experiments.tune_blocks writes one" in text
    assert not (tmp_path / "out").exists()
