"""The studies, the profile of block sizes and extraction on mixtures of experts: all weights of experts are in them."""

import csv
import json

import pytest
import torch
from torch.nn import functional as F

from experiments import decompose_study, extract, quant_study, run, tune_blocks
from experiments.blocks.profile import Calibration, Profile, profile_model, read_profile, write_profile
from experiments.config import resolve
from experiments.data.chat import IGNORED, Example
from experiments.models.load import load_base, load_model
from experiments.models.tiny import byte_tokenizer
from experiments.runs.shared_base import _pack
from experiments.system.cli import composed
from modules import attach
from modules.experts import NF4Experts
from modules.mixtures import take_over_experts
from tests.experiments.helpers import TINY, write_chats
from tests.modules.moe_cases import experts_of, moe_model
from tests.survey.small import build

EXPERTS = [f"model.layers.{n}.mlp.experts.{name}" for n in range(2) for name in ("gate_up_proj", "down_proj")]
SAMPLES = [Example(row, [IGNORED] + row[1:]) for row in ([5, 9, 7, 30, 2], [8, 40, 3])]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """Overrides with the directory of a small Qwen3-MoE and its data."""
    folder = tmp_path_factory.mktemp("studies")
    model = build("qwen3_moe")
    model.save_pretrained(folder / "mixture")
    byte_tokenizer(model.config.vocab_size).save_pretrained(folder / "mixture")
    return ["model=hf", f"model.path={folder / 'mixture'}", "data=jsonl", f"data.path={write_chats(folder)}"]


def test_quant_study(terminal, given, tmp_path):
    settings = ["quant_types=[nf4]", "blocksizes=[64]", "double=[true]", "every=1", "values=1000"]
    code, text = terminal(quant_study, *given, *settings, f"output_dir={tmp_path}")
    assert code == 0, text
    with (tmp_path / "study.csv").open() as file:
        rows = {row["weights"]: row for row in csv.DictReader(file)}
    assert rows.keys() > set(EXPERTS)
    assert all(0.05 < float(rows[name]["rms_relative"]) < 0.15 for name in EXPERTS)


def test_decompose_study_takes_each_expert_as_a_matrix(given, tmp_path):
    cfg = decompose_study.DecomposeConfig(base=given[1].removeprefix("model.path="), ranks=[2], every=1)
    found = decompose_study.matrices(cfg)[decompose_study.WEIGHTS]
    assert {name for name in found if "experts" in name} == {f"{name}.{e}" for name in EXPERTS for e in range(4)}
    assert {found[f"{EXPERTS[0]}.{e}"].shape for e in range(4)} == {(64, 64)}


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_calibration_sees_each_experts_inputs_and_gradients(kind):
    """Against transformers' own code: gradients from its parameters, inputs of experts by its router."""
    model, plain = moe_model(kind), moe_model(kind)
    take_over_experts(model)
    calibration = Calibration(model)
    calibration.see(SAMPLES, torch.Generator().manual_seed(0))
    generator, squares = torch.Generator().manual_seed(0), dict.fromkeys(EXPERTS, 0.0)
    for sample in SAMPLES:
        ids = torch.tensor([sample.input_ids])
        logits = plain(input_ids=ids, use_cache=False).logits[0, :-1]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        plain.zero_grad()
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        for name in EXPERTS:
            gradient = plain.get_parameter(name).grad
            squares[name] = squares[name] + (gradient.mT if kind == "gpt_oss" else gradient).square()
    for name in EXPERTS:
        found = calibration.squares[name]
        assert (found - squares[name]).norm() < 1e-4 * squares[name].norm()
        assert calibration.inputs[name].shape == (4, found.shape[2], found.shape[2])
    per_expert = torch.zeros(4, 64, 64)

    def watch(_, args: tuple) -> None:
        for x, experts in zip(args[0].detach().flatten(0, -2), args[1]):
            per_expert[experts] += torch.outer(x, x)

    hook = plain.model.layers[0].mlp.experts.register_forward_pre_hook(watch)
    for sample in SAMPLES:
        plain(input_ids=torch.tensor([sample.input_ids]), use_cache=False)
    hook.remove()
    torch.testing.assert_close(calibration.inputs[EXPERTS[0]], per_expert, rtol=1e-4, atol=1e-4)


def test_a_profile_of_experts_is_written_and_read(tmp_path):
    model = moe_model("qwen3_moe")
    take_over_experts(model)
    calibration = Calibration(model)
    calibration.see(SAMPLES, torch.Generator().manual_seed(0))
    profile = Profile({"model": "m", "type": "nf4", "double": True}, profile_model(calibration, True))
    write_profile(tmp_path / "profile.csv", profile)
    assert profile.shapes[EXPERTS[1]] == (4, 64, 32)
    assert read_profile(tmp_path / "profile.csv") == profile


def test_a_tuned_map_packs_the_experts_of_a_run(terminal, given, tmp_path):
    code, text = terminal(tune_blocks, *given, "samples=2", "dtype=float32", f"output_dir={tmp_path / 'tuned'}")
    assert code == 0 and "2 gate_up_proj" in text, text
    quant = ["quant=tuned", f"quant.map={tmp_path / 'tuned' / 'map.yaml'}"]
    cfg = resolve(composed("+method=qlora", *given, *quant, "trainer.dtype=float32", "output_dir=."))
    model, _ = load_base(cfg, torch.float32)
    assert sum(isinstance(module, NF4Experts) for module in model.modules()) == 4


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_extraction_at_full_rank_is_the_tuned_weight_of_each_expert(adapter):
    model = moe_model("qwen3_moe")
    attach(model, adapter, rank=32, lora_alpha=32, target_modules=["down_proj"])
    for layer in experts_of(model).values():
        tuned = layer.base.weight.detach() + 0.05 * torch.randn(layer.base.weight.shape)
        assert extract.set_extracted(layer, tuned, "svd") < 1e-4
        torch.testing.assert_close(layer.merged_weight(), tuned, rtol=1e-3, atol=1e-4)


def test_extract(terminal, given, tmp_path):
    full = [*TINY, *given, "+method=full", "trainer.samples=0", "lr=1e-2", f"output_dir={tmp_path / 'full'}"]
    run.run(resolve(composed(*full)))
    base = given[1].removeprefix("model.path=")
    pair = [f"base={base}", f"tuned={tmp_path / 'full'}", "rank=4", "adapter=lora", *given[2:]]
    code, text = terminal(extract, *pair, f"output_dir={tmp_path / 'out'}")
    assert code == 0, text
    written = json.loads((tmp_path / "out" / "extract.json").read_text())
    assert written["layer_errors"].keys() > set(EXPERTS)
    assert not any("experts" in name for name in written["changed_elsewhere"])


def test_experts_of_a_class_that_is_not_known_are_told(terminal, tmp_path):
    model = build("dbrx")
    model.save_pretrained(tmp_path / "dbrx")
    byte_tokenizer(model.config.vocab_size).save_pretrained(tmp_path / "dbrx")
    settings = ["quant_types=[nf4]", "blocksizes=[64]", "double=[true]", "values=1000", "loss=false"]
    given = ["model=hf", f"model.path={tmp_path / 'dbrx'}", f"output_dir={tmp_path / 'out'}"]
    code, text = terminal(quant_study, *given, *settings)
    assert code == 0 and "left out: experts of a class not known here, v1 (2), w1 (2), w2 (2): 147,456 weights" in text


def test_a_sweep_shares_packed_experts(given, tmp_path):
    cfg = resolve(composed("+method=qdora", *TINY, *given, f"output_dir={tmp_path}"))
    _pack(cfg, tmp_path)
    packed = resolve(composed("+method=qdora", "model=hf", f"model.path={tmp_path / 'packed'}", "output_dir=."))
    shared, _ = load_model(packed.model, torch.float32, seed=0)
    own, _ = load_base(cfg, torch.float32)
    states = shared.state_dict(), own.state_dict()
    assert states[0].keys() == states[1].keys() and sum(isinstance(m, NF4Experts) for m in shared.modules()) == 4
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
