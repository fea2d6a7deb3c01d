"""What is measured beside the loss: exact match, forgetting, the rank in use, energy; and the arithmetic problems."""

import csv
import json
import re

import pytest
import torch
from torch import nn

from experiments.config import ModelConfig, resolve
from experiments.data.arithmetic import LEVELS, PROBLEMS, problems
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.load import load_model
from experiments.runs import measures
from experiments.runs.finished import load_run
from experiments.runs.measures import Measures
from experiments.runs.spectrum import effective_rank, singular_values, spectra
from experiments.system.energy import EnergyMeter
from experiments.training.evaluation import evaluate
from modules import DoRALinear, LoRALinear, attach
from modules.adapters.init import initialise
from tests.experiments.conftest import composed

# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_right_and_numbers_are_in_the_question(level):
    found = problems(level)
    assert len({problem.question for problem in found}) == PROBLEMS == len(found)
    for problem in found:
        assert eval(problem.calculation) == problem.answer >= 0, problem
        numbers = sorted(map(int, re.findall(r"\d+", problem.calculation)))
        assert sorted(map(int, re.findall(r"\d+", problem.question))) == numbers, problem
        if expression := re.search(r"[\d(]+ ?[+*-][\d+*() -]*\d", problem.question):  # in numbers
            assert eval(expression[0]) == problem.answer, problem
    assert {problem.level for problem in found} == {level}


def test_no_calculation_is_in_both_parts():
    cfg = resolve(composed("+method=lora", "data=arithmetic", "data.max_heldout=null", "data.max_train=400")).data
    _, tokenizer = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, 0)
    data = load_data(cfg, tokenizer)
    calculation = {problem.question: problem.calculation for level in LEVELS for problem in problems(level)}

    def calculations(part):
        texts = [tokenizer.decode(example.prompt_ids) for example in part]
        return {calculation[re.search(r"user\n(.*?)<", text, re.S)[1]] for text in texts}

    assert 0.08 < len(data.heldout) / (PROBLEMS * len(LEVELS)) < 0.12
    assert calculations(data.train).isdisjoint(calculations(data.heldout))
    assert {example.level for example in data.heldout} == {example.level for example in data.train} == set(LEVELS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.levels=[5]", "data.levels=[5]: choose some of 1, 2, 3, 4"),
        ("data.levels=[]", "choose some of 1, 2, 3, 4"),
        ("data.path=x", "reads no file"),
        ("data.answer_tokens=-1", "less than 0"),
        ("data=docstrings", "data=docstrings has no levels"),
    ],
)
def test_bad_settings(override, message):
    cfg = resolve(composed("+method=lora", "data=arithmetic", "data.levels=[1]", override)).data
    with pytest.raises(UserError, match=re.escape(message)):
        load_data(cfg, tokenizer=None)


def test_a_second_domain_without_its_file_is_answered_in_one_line(command, tmp_path):
    code, text = command("+method=lora", "data@second=jsonl")
    assert code == 1 and "data@second=jsonl, whose keys are second.…: data=jsonl needs data.path=FILE" in text
    assert "Traceback" not in text and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------- exact match, forgetting


def test_exact_match_counts_by_level(monkeypatch):
    cfg = resolve(composed("+method=lora", "model=tiny", "data=arithmetic", "data.max_heldout=20", "data.max_train=1"))
    model, tokenizer = load_model(cfg.model, torch.float32, 0)
    data = load_data(cfg.data, tokenizer)
    reference = {tuple(example.prompt_ids): example.reference for example in data.heldout}
    right = {tuple(example.prompt_ids) for example in data.heldout if example.level in (1, 3)}

    def answers(model, tokenizer, prompts, max_new_tokens):
        assert max_new_tokens == 8
        return [f" {reference[tuple(ids)]}\n" if tuple(ids) in right else "41 apples" for ids in prompts]

    monkeypatch.setattr(measures, "answer", answers)
    found = Measures(cfg, data, tokenizer).measure(model)
    assert found == {"exact_match": len(right) / 20} | {
        f"exact_match_level_{level}": float(level in (1, 3)) for level in LEVELS
    }


def test_a_run_measures_answers_and_what_it_forgets(command, tmp_path, chats):
    code, text = command(
        "+method=lora",
        *("data.answer_tokens=12", "trainer.steps=30", "lr=3e-2", "trainer.eval_every=0"),
        *("data@second=jsonl", f"second.path={chats}", "second.max_heldout=3"),
    )
    assert code == 0, text
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    assert result["exact_match_before"] == 0 and result["second_loss_after"] < result["second_loss_before"]
    assert "exact match " in text and "second loss " in text
    run = load_run(out)
    second = load_data(run.cfg.second, run.tokenizer).heldout
    assert len(second) == 3
    loss = evaluate(run.model, second, 2, run.tokenizer.pad_token_id).loss
    assert loss == pytest.approx(result["second_loss_after"], rel=1e-5)

    rows = list(csv.DictReader((out / "spectrum.csv").open()))
    assert len(rows) == 14 and all(len(row["singular_values"].split()) == 4 for row in rows)
    mean = sum(float(row["effective_rank"]) for row in rows) / len(rows)
    assert result["effective_rank"] == pytest.approx(mean, rel=1e-4) and 1 <= mean <= 4


def test_a_resumed_run_remembers_what_was_measured_before(command, tmp_path):
    more = ["data.answer_tokens=4", "trainer.checkpoint_every=2", "data@second=arithmetic", "second.max_heldout=4"]
    assert command("+method=lora", "trainer.steps=2", *more)[0] == 0
    first = json.loads((tmp_path / "out" / "result.json").read_text())
    code, text = command("+method=lora", "trainer.steps=4", *more, "resume=latest")
    assert code == 0, text
    second = json.loads((tmp_path / "out" / "result.json").read_text())
    for key in ("second_loss_before", "exact_match_before"):
        assert second[key] == first[key]
    assert second["second_loss_after"] != first["second_loss_after"]


# ---------------------------------------------------------------------------------- rank in use


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(24, 17, 5), (9, 33, 9), (16, 16, 1)])
def test_singular_values_are_those_of_the_update(kind, out_features, in_features, rank):
    torch.manual_seed(0)
    layer = kind(nn.Linear(in_features, out_features), rank, lora_alpha=3.0)
    nn.init.normal_(layer.lora_B)
    update = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    expected = torch.linalg.svdvals(update)
    found = singular_values(layer)
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-10, atol=1e-12)
    assert len(found) == min(rank, out_features, in_features)


def test_the_part_that_an_initialisation_took_of_the_weight_is_no_update():
    layer = LoRALinear(nn.Linear(20, 12), 4, lora_alpha=4.0)
    initialise(layer, "pissa")
    assert singular_values(layer).max() < 1e-5
    with torch.no_grad():
        layer.lora_B[:, 0] += 1
    found = singular_values(layer)
    assert len(found) == 8 and effective_rank(found) < 1.01  # twice the rank, one direction in use


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(6).double()) == pytest.approx(6)
    assert effective_rank(torch.tensor([3.0, 0, 0]).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(3).double()) == 0
    shares = torch.tensor([0.5, 0.25, 0.25]).double()  # entropy 1.5 bits
    assert effective_rank(7 * shares) == pytest.approx(2**1.5)


def test_a_new_adapter_has_no_spectrum():
    model = nn.Sequential(nn.Linear(8, 6))
    attach(model, "lora", 2)
    [row] = spectra(model)
    assert row["effective_rank"] == row["stable_rank"] == row["rank_90"] == row["relative_norm"] == 0
    with torch.no_grad():
        nn.init.orthogonal_(model[0].lora_A)
        nn.init.orthogonal_(model[0].lora_B)
    [row] = spectra(model)  # two equal singular values: s = lora_alpha / rank = 2
    assert [row[key] for key in ("effective_rank", "stable_rank", "rank_90")] == pytest.approx([2, 2, 2])
    weight_norm = model[0].base.weight.norm().item()
    assert row["norm"] == pytest.approx(8**0.5) and row["relative_norm"] == pytest.approx(8**0.5 / weight_norm)


# --------------------------------------------------------------------------------------- energy


def test_energy_adds_up_packages_and_memory_over_wraps(tmp_path):
    def zone(folder: str, name: str, microjoules: int) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "name").write_text(name + "\n")
        (tmp_path / folder / "max_energy_range_uj").write_text("9999999\n")
        (tmp_path / folder / "energy_uj").write_text(f"{microjoules}\n")

    def counters(package: int, core: int, memory: int) -> None:
        zone("intel-rapl:0", "package-0", package)
        zone("intel-rapl:0:0", "core", core)  # a part of the package
        zone("intel-rapl:0:1", "dram", memory)

    counters(9_000_000, 5, 1_000_000)
    meter = EnergyMeter(tmp_path)
    counters(1_000_000, 4_000_005, 1_500_000)  # the package went through 0
    assert meter.joules() == pytest.approx(2.5)
    counters(3_000_000, 6_000_005, 1_500_000)
    assert meter.joules() == pytest.approx(4.5)


def test_energy_is_none_where_the_machine_does_not_tell(tmp_path):
    assert EnergyMeter(tmp_path / "missing").joules() is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "name").write_text("package-0\n")  # a counter that cannot be read
    assert EnergyMeter(tmp_path).joules() is None
