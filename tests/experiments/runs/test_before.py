"""What is measured before training, once for runs that start with the same model."""

import dataclasses
from pathlib import Path

import pytest

from experiments.config import resolve
from experiments.data.chat import Example
from experiments.runs import one_run, sweep
from experiments.runs.before import start_of
from experiments.system.cli import composed
from tests.experiments.helpers import SMALL, assert_same, repeatable_records, result, tiny

MEASURED = [
    "trainer=debug",
    *SMALL,
    "data=arithmetic",
    "data.answer_tokens=4",
    "data@second=records",
    "trainer.eval_every=0",
]
HELDOUT = ["second.max_heldout=4", "trainer.dtype=float32"]


def configured(*overrides: str):
    return resolve(composed(*MEASURED, *HELDOUT, *overrides))


@pytest.mark.parametrize("method", [["+method=qdora", "rank=4"], ["+method=prefix_embed", "prefix_tokens=3"]])
def test_a_run_is_the_same_with_what_an_earlier_one_measured(tmp_path, monkeypatch, method):
    for part in tiny():  # model and tokenizer
        part.save_pretrained(tmp_path / "model")
    base = ["model=hf", f"model.path={tmp_path / 'model'}", *method]
    known = {}
    one_run.run(configured(*base, "lr=1e-4", "seed=3", f"output_dir={tmp_path / 'earlier'}"), before=known)
    other = [*base, "lr=1e-2", "seed=4", "trainer.batch_size=3"]
    one_run.run(configured(*other, f"output_dir={tmp_path / 'alone'}"))
    evaluate, steps = one_run.evaluate_each, []
    monkeypatch.setattr(one_run, "evaluate_each", lambda *args: steps.append(args) or evaluate(*args))
    (before,) = known.values()
    one_run.run(configured(*other, f"output_dir={tmp_path / 'with'}"), before=known)
    assert len(steps) == 1, "measured after training alone"
    assert list(known.values()) == [before]
    assert_same(tmp_path / "alone", tmp_path / "with")
    assert repeatable_records(tmp_path / "with")[0]["step"] == 0
    assert result(tmp_path / "with")["total_seconds"] > before.seconds > 0, (
        "its cost does not depend on which run came first"
    )


def test_runs_that_start_with_the_same_model():
    def start(*overrides):
        return start_of(configured("output_dir=unused", *overrides), samples)

    samples = [Example([1, 2, 3], [-100, 2, 3])]

    one = start("+method=lora", "lr=1e-4")
    for training in (["lr=1"], ["seed=7"], ["trainer.steps=9"], ["trainer.batch_size=5", "trainer.warmup=0.5"]):
        assert start("+method=lora", *training) == one, training
    others = ["+method=dora"], ["+method=qlora"], ["data.max_heldout=3"], ["trainer.eval_batch_size=2"], ["rank=2"]
    others += ["model=tiny"], ["data.answer_tokens=5"], ["trainer.threads=1"], ["data@second=facts"]
    for given in others:
        assert start(*(["+method=lora"] if "method" not in given[0] else []), *given) != one, given
    for drawn in (["model=tiny"], ["init=orthogonal"]):
        assert start("+method=lora", "seed=1", *drawn) != start("+method=lora", "seed=2", *drawn), drawn
    samples.append(samples[0])
    assert start("+method=lora") != one, "the file of data has changed"


def test_a_sweep_hands_it_from_job_to_job(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "_before", {})

    def cfg(lr: float):
        return configured("+method=lora", "model=tiny", "trainer.steps=1", f"lr={lr}", f"output_dir={tmp_path}")

    assert sweep.job(cfg(1e-4), "one").status == sweep.DONE
    (known,) = sweep._before.values()
    known.evaluation = dataclasses.replace(known.evaluation, loss=9.75)
    outcome = sweep.job(cfg(1e-3), "other")
    assert result(Path(outcome.directory))["loss_before"] == 9.75
