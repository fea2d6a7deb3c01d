"""The measures beside the loss: exact match, and what is forgotten of a second domain."""

import csv
import json
import re

import numpy
import pytest
import torch

from experiments.config import resolve
from experiments.data.arithmetic import LEVELS
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.load import load_model
from experiments.runs import measures
from experiments.runs.finished import load_run
from experiments.runs.heldout import name_of, read
from experiments.runs.measures import Measures
from experiments.system.cli import composed
from experiments.training.evaluation import evaluate


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


def test_exact_match_counts_by_level(monkeypatch):
    cfg = resolve(composed("+method=lora", "model=tiny", "data=arithmetic", "data.max_heldout=20", "data.max_train=1"))
    model, tokenizer = load_model(cfg.model, torch.float32, 0)
    data = load_data(cfg.data, tokenizer)
    reference = {tuple(example.prompt_ids): example.reference for example in data.heldout}
    right = {tuple(example.prompt_ids) for example in data.heldout if example.level in (1, 3)}

    def answers(model, tokenizer, prompts, max_new_tokens, kept):
        assert max_new_tokens == 8
        return [f" {reference[tuple(ids)]}\n" if tuple(ids) in right else "41 apples" for ids in prompts]

    monkeypatch.setattr(measures, "answer", answers)
    found = Measures(cfg, data, tokenizer).measure(model)
    assert found.flags == {"exact_match": [tuple(example.prompt_ids) in right for example in data.heldout]}
    assert found.numbers == {"exact_match": len(right) / 20} | {
        f"exact_match_level_{level}": float(level in (1, 3)) for level in LEVELS
    }


def test_records_are_judged_as_data(monkeypatch):
    """Of four answers one has its keys in another order, one a wrong value, one is cut off, one is exact."""
    cfg = resolve(composed("+method=lora", "model=tiny", "data=records", "data.max_heldout=4", "data.max_train=1"))
    model, tokenizer = load_model(cfg.model, torch.float32, 0)
    data = load_data(cfg.data, tokenizer)
    changes = {
        0: lambda text: json.dumps(dict(reversed(json.loads(text).items()))),
        1: lambda text: json.dumps(json.loads(text) | {"quantity": 1}),
        2: lambda text: text[:-1],
        3: lambda text: f" {text}\n",
    }
    texts = {tuple(e.prompt_ids): changes[place](e.reference) for place, e in enumerate(data.heldout)}
    monkeypatch.setattr(measures, "answer", lambda m, t, prompts, n, kept: [texts[tuple(ids)] for ids in prompts])
    found = Measures(cfg, data, tokenizer).measure(model)
    assert found.numbers == {"exact_match": 0.5, "valid": 0.75}
    assert found.flags == {"exact_match": [True, False, False, True], "valid": [True, True, False, True]}


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

    heldout = load_data(run.cfg.data, run.tokenizer).heldout
    for which, part, measured in (("heldout", heldout, "loss_after"), ("second", second, "second_loss_after")):
        samples = read(out)[which]
        each = [evaluate(run.model, [example], 1, run.tokenizer.pad_token_id) for example in part]
        assert samples.names == [name_of(example) for example in part] and len(set(samples.names)) == len(part)
        assert samples.values["loss"] == pytest.approx([one.loss for one in each], rel=1e-4)
        assert list(samples.weights["loss"]) == [one.tokens for one in each]
        mean = numpy.average(samples.values["loss"], weights=samples.weights["loss"])
        assert mean == pytest.approx(result[measured], rel=1e-5)
    assert read(out)["heldout"].values["exact_match"].mean() == pytest.approx(result["exact_match_after"])

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
