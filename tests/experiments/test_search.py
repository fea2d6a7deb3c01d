"""Searches: what Optuna is asked and told, on jobs that are made up; one search of real runs."""

import json
import sqlite3
from pathlib import Path

import pytest

from experiments import search
from experiments.runs import sweep
from tests.experiments.helpers import TINY

SPACE = ["lr=log(1e-4,1e-1)", "rank=2,4", "quant.blocksize=64,128"]


@pytest.fixture
def start(terminal, tmp_path):
    """start(*arguments) searches in tmp_path / "out"; returns (exit code, what it printed)."""
    return lambda *more: terminal(search, "+method=qlora", *TINY[:2], *SPACE, f"output_dir={tmp_path / 'out'}", *more)


@pytest.fixture
def jobs(monkeypatch):
    """Jobs that are not run: the loss is lr, and with rank 2 it is 9 after the first evaluation."""
    done = []

    def job(cfg, name, watch):
        done.append(cfg)
        for step in (2, 4):
            if watch({"step": step, "heldout_loss": 9.0 if cfg.rank == 2 else cfg.lr}):
                return sweep.Outcome(sweep.STOPPED, f"after step {step}")
        if cfg.quant.blocksize == 128:
            return sweep.Outcome(sweep.FAILED, "broken")
        directory = Path(cfg.output_dir) / name
        directory.mkdir(parents=True)
        (directory / "result.json").write_text(json.dumps({"loss_after": cfg.lr}))
        return sweep.Outcome(sweep.DONE, directory=str(directory))

    monkeypatch.setattr(sweep, "job", job)
    return done


def test_trials_end_are_stopped_or_fail(start, jobs, tmp_path):
    code, text = start("trials=14")
    assert code == 0 and len(jobs) == 14, text
    assert {cfg.rank for cfg in jobs} == {2, 4} and {cfg.quant.blocksize for cfg in jobs} == {64, 128}
    assert all(1e-4 <= cfg.lr <= 1e-1 for cfg in jobs) and len({cfg.lr for cfg in jobs}) == 14
    stopped, failed = text.count("stopped after step 2\n"), text.count("\nfailed: broken\n")
    assert stopped and failed and f" trials ended, {stopped} were stopped, {failed} failed" in text
    best = min(json.loads(path.read_text())["loss_after"] for path in (tmp_path / "out").rglob("result.json"))
    assert f"lr={best:.4g}" in text.rpartition("confirm it on the held-out ones: ")[2]
    with sqlite3.connect(tmp_path / "out" / "study.db") as study:
        assert study.execute("select count(*) from trials").fetchone() == (14,)


def test_a_search_goes_on_and_does_again_what_was_cut_off(start, jobs, monkeypatch):
    made_up = sweep.job

    def cut_off(cfg, *more):
        if len(jobs) == 3:
            raise KeyboardInterrupt
        return made_up(cfg, *more)

    monkeypatch.setattr(sweep, "job", cut_off)
    code, text = start("trials=5")
    assert code == 130 and len(jobs) == 3
    monkeypatch.setattr(sweep, "job", made_up)
    lr = text.rpartition("trial 3: lr=")[2].split()[0]
    code, text = start("trials=5")
    assert code == 0 and len(jobs) == 5 and f"{jobs[3].lr:.4g}" == lr
    code, text = start("trials=5")
    assert code == 0 and len(jobs) == 5 and "trials ended" in text, "nothing is left to do"
    code, text = start("trials=5", "seed=1")
    assert code == 1 and "study.db is of other arguments, +method=qlora" in text
    assert len(jobs) == 5
    assert {cfg.data.part for cfg in jobs} == {"validation"}, "the held-out samples stay unseen"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=log(0,1)"], "lr=log(0,1): a range goes from low to high, above 0 on a logarithmic scale"),
        (["lr=uniform(2,1)"], "lr=uniform(2,1): a range goes from low to high"),
        (["lr=log(a,b)"], "lr=log(a,b): a range has two numbers, low and high"),
        (["lr=log(1)"], "lr=log(1): a range has two numbers, low and high"),
        (["rank=4"], "nothing to search: give a key several values"),
        (["rank=4,8"], "no method: add one, +method=qdora, or several to choose from"),
        (["rank=4,8", "trials=0"], "trials=0: choose 1 or more"),
        (["rank=4,8", "sweep=rank"], "sweep=rank: a search makes its own jobs"),
        (["rank=4,8", "data.part=heldout"], "data.part=heldout: a search measures on validation samples: leave it out"),
        (["rankk=4,8"], "no such key: rankk; did you mean rank?"),
        (["rank=4,8", "trainer.steps=x"], "trainer.steps=x: choose a whole number"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(terminal, tmp_path, arguments, message):
    method = [] if "no method" in message else ["+method=lora"]
    code, text = terminal(search, *method, *TINY[:2], *arguments, f"output_dir={tmp_path / 'out'}")
    assert code == 1 and text.startswith("error: ") and message in text and text.count("\n") <= 1, text
    assert not (tmp_path / "out").exists()


def test_without_optuna_it_says_how_to_get_it(start, monkeypatch):
    monkeypatch.setattr(search, "optuna", None)
    assert start() == (1, "error: a search needs Optuna: pip install optuna==5.0.0")


def test_a_damaged_study_is_named(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.db").write_text("no database, but more than a few bytes long " * 99)
    code, text = start()
    assert code == 1 and "study.db cannot be read: " in text and "Traceback" not in text


def test_real_runs_are_stopped_and_found_again(start, chats):
    real = ["data=jsonl", f"data.path={chats}", "data.max_heldout=2", "trainer.samples=0", "trainer.steps=2"]
    code, text = start(*real, "trainer.eval_every=1", "trials=2")
    assert code == 0 and text.count("validation loss ") == 2, text
    assert "2 trials ended, 0 were stopped, 0 failed" in text
