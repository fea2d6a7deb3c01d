"""A run that was killed and goes on equals one that was not: metrics, weights, optimizer state, bit for bit."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from experiments import run
from experiments.data.samples import load_data
from experiments.runs import checkpoints, one_run
from experiments.runs.finished import load_run
from experiments.training import loop
from experiments.training.evaluation import evaluate
from experiments.training.loop import Trainer
from tests.experiments.helpers import (
    CHECKPOINTS,
    SMALL,
    TINY,
    assert_same,
    repeatable_records,
    repeatable_result,
    tensors,
    unseal,
)
from tests.experiments.killed_runs import kill

METHODS = ["full", "qdora", "prefix_layer"]  # `python -m tests.torture` ends every method


@pytest.fixture
def killed(tmp_path, chats):
    """killed(at, *overrides) makes a run that ends in SIGKILL; returns its directory."""

    def start(at: str, *overrides: str) -> Path:
        out = tmp_path / "killed"
        kill([*TINY, "data=jsonl", f"data.path={chats}", f"output_dir={out}", *CHECKPOINTS, *SMALL, *overrides], at)
        return out

    return start


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(killed, command, tmp_path, method):
    dropout = ["dropout=0.1"] if method.endswith(("lora", "dora")) else []
    overrides = [f"+method={method}", *dropout, "trainer.keep_best=true", "lr=1e-2"]
    out = killed("log 5", *overrides)
    assert checkpoints.of_run(out)[-1].name == "step-00000004" and not (out / "result.json").exists()
    assert not (out / "metrics.jsonl").read_text().endswith("\n")

    code, text = command(f"resume={out}", *overrides, *CHECKPOINTS, *SMALL, f"output_dir={out}")
    assert code == 0, text
    code, text = command(*overrides, *CHECKPOINTS, *SMALL, f"output_dir={tmp_path / 'whole'}")
    assert code == 0, text
    assert [record["step"] for record in repeatable_records(out) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert_same(out, tmp_path / "whole")


@pytest.mark.parametrize(
    "number, at",
    [(signal.SIGINT, "a step"), (signal.SIGTERM, "an evaluation"), (signal.SIGHUP, "a step")],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_leaves_a_checkpoint_by_default(command, terminal, tmp_path, monkeypatch, number, at):
    """It comes in the middle of step 4, or of the evaluation after it, and the run goes on as if it had not."""
    settings = ["+method=qdora", "dropout=0.1", "lr=1e-2", "trainer.steps=6", *SMALL]
    owner, name = (Trainer, "step") if at == "a step" else (one_run, "evaluate_each")
    whole, calls = getattr(owner, name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == (4 if at == "a step" else 3):  # evaluations are at steps 0, 2 and 4
            os.kill(os.getpid(), number)
        return whole(*args)

    monkeypatch.setattr(owner, name, interrupted)
    code, text = command(*settings)
    out = tmp_path / "out"
    assert code == 128 + number and "Traceback" not in text
    assert text.rstrip().endswith(f"interrupted\ngo on with: python -m experiments.run resume={out}")
    assert [path.name for path in checkpoints.of_run(out)] == ["step-00000004"]
    monkeypatch.undo()
    code, text = terminal(run, f"resume={out}")
    assert code == 0 and "going on after step 4" in text, text
    assert not (out / "checkpoints").exists(), "a run that has finished needs none"
    assert command(*settings, f"output_dir={tmp_path / 'whole'}")[0] == 0
    assert_same(out, tmp_path / "whole")


def test_checkpoints_by_time(command, tmp_path, monkeypatch):
    """Nobody asked for them: an adapter's run has one when the time has come, full fine-tuning none."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    saved = []
    monkeypatch.setattr(checkpoints.Checkpoints, "save", lambda self, trainer, now: saved.append(self.cfg.method.name))
    for method in ("lora", "full"):
        assert command(f"+method={method}", *SMALL, f"output_dir={tmp_path / method}")[0] == 0
    assert command("+method=dora", *SMALL, "trainer.checkpoint_every=0")[0] == 0
    assert saved == ["lora"] * 4


def test_a_full_disk_is_one_line(command, tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    code, text = command("+method=lora", "trainer.checkpoint_every=2")
    out = tmp_path / "out"
    assert code == 1 and "Traceback" not in text
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {out / 'checkpoints' / 'step-00000002'} cannot be written: ") and "No space" in line
    assert f"stopped after step 2: its weights and metrics are in {out}" in text
    assert (out / "adapter").is_dir() and not list(out.rglob("*.partial"))


def test_killed_while_a_checkpoint_is_written(killed, terminal, command, tmp_path):
    out = killed("save 4", "+method=lora")
    assert list((out / "checkpoints").glob(".step-00000004.*.partial"))
    assert checkpoints.of_run(out)[-1].name == "step-00000002"
    code, text = terminal(run, f"resume={out}")
    assert code == 0 and f"going on after step 2 of {out}" in text, text
    assert command("+method=lora", *CHECKPOINTS, *SMALL, f"output_dir={tmp_path / 'whole'}")[0] == 0
    assert_same(out, tmp_path / "whole")
    names = [path.name for path in sorted((out / "checkpoints").iterdir())]
    assert names == ["step-00000004", "step-00000006"]


@pytest.fixture
def finished(finished_once, tmp_path, chats) -> Path:
    """A copy of `finished_once` that was trained on `chats`."""
    shutil.copytree(finished_once, tmp_path / "out")
    unseal(tmp_path / "out")
    for path in (tmp_path / "out").rglob("config.yaml"):
        path.write_text(path.read_text().replace(str(finished_once.parent), str(tmp_path)))
    return tmp_path / "out"


def test_another_configuration_is_refused_by_its_keys(finished, command):
    code, text = command("+method=qdora", *CHECKPOINTS, *SMALL, "lr=1e-3", "rank=2", "resume=latest")
    assert code == 1 and "Traceback" not in text
    assert "is of another configuration: lora_alpha (8.0 there, 4.0 here), lr (0.01 there, 0.001 here), rank (4" in text


def test_a_finished_run_has_nothing_left_to_do_until_steps_are_added(finished, terminal):
    code, text = terminal(run, f"resume={finished}")
    assert code == 1 and "nothing is left to do after its 6 steps: raise trainer.steps" in text
    code, text = terminal(run, f"resume={finished}", "trainer.steps=5")
    assert code == 1 and "nothing is left to do after its 6 steps" in text
    code, text = terminal(run, f"resume={finished}", "trainer.steps=8")
    assert code == 0 and "trainer.steps was 6: the learning rate follows the new schedule" in text, text
    assert [record["step"] for record in repeatable_records(finished) if "loss" in record] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert repeatable_result(finished)["steps"] == 8


def test_an_older_checkpoint_of_a_run(finished, terminal):
    whole = tensors(finished), repeatable_records(finished)
    (finished / "result.json").unlink()
    code, text = terminal(run, f"resume={finished / 'checkpoints' / 'step-00000004'}")
    assert code == 0 and "going on after step 4" in text, text
    assert (tensors(finished), repeatable_records(finished)) == whole


def test_latest_is_the_newest_run_of_the_folder(finished, terminal, monkeypatch):
    (finished / "result.json").unlink()
    monkeypatch.chdir(finished.parent)
    finished.rename(finished.parent / "outputs")
    Path("outputs").rename("run")
    Path("outputs").mkdir()
    Path("run").rename("outputs/run")
    code, text = terminal(run, "resume=latest")
    assert code == 0 and f"going on after step 6 of {Path('outputs/run').absolute()}" in text, text


def test_damaged_checkpoints_are_named(finished, terminal):
    for name in ("weights.safetensors", "training.safetensors", "training.json"):
        path = finished / "checkpoints" / "step-00000006" / name
        whole = path.read_bytes()
        for content in (whole[:-100], b"\x80\x04not safetensors", None):
            path.unlink() if content is None else path.write_bytes(content)
            code, text = terminal(run, f"resume={finished}", "trainer.steps=8")
            assert code == 1 and "Traceback" not in text, text
            assert f"{path} is damaged" in text or f"{path} cannot be read" in text, text
            path.write_bytes(whole)


def test_a_checkpoint_of_other_data_or_dtype_is_refused(finished, terminal, chats):
    state = finished / "checkpoints" / "step-00000006" / "training.json"
    state.write_text(state.read_text().replace("torch.float32", "torch.bfloat16"))
    code, text = terminal(run, f"resume={finished}", "trainer.steps=8")
    assert code == 1 and "computed in bfloat16, this run does in float32: set trainer.dtype=bfloat16" in text, text
    chats.write_text(chats.read_text().replace("plus", "and"))
    code, text = terminal(run, f"resume={finished / 'checkpoints' / 'step-00000004'}", "trainer.steps=8")
    assert code == 1 and "was trained on other data than jsonl is now" in text, text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["resume=latest"], "no checkpoint there; a run that has finished keeps some with trainer.checkpoint"),
        (["resume=/nowhere"], "resume=/nowhere: /nowhere: no such directory"),
        (["trainer.keep_checkpoints=0"], "trainer.keep_checkpoints=0: choose 1 or more"),
        (
            ["trainer.eval_every=0", "trainer.keep_best=true"],
            "trainer.keep_best compares evaluations: set trainer.eval",
        ),
        (["trainer.eval_every=0", "trainer.early_stopping_patience=1"], "compares evaluations: set trainer.eval_every"),
    ],
    ids=["nothing to resume", "no such run", "keep none", "best of none", "stop after none"],
)
def test_bad_settings(command, tmp_path, overrides, message):
    (tmp_path / "out").mkdir()
    code, text = command("+method=lora", *overrides)
    assert code == 1 and message in text and "Traceback" not in text, text


def test_checkpoints_are_not_overwritten(finished, command):
    before = tensors(finished)
    code, text = command("+method=qdora")
    assert code == 1 and f"step-00000006 is there: go on from it with resume={finished}, choose another" in text
    assert tensors(finished) == before


def test_a_run_under_a_methods_old_name_goes_on(command, tmp_path):
    """`adapter` was the name of `houlsby`: in the configuration of old runs, and still on the command line."""
    out = tmp_path / "out"
    assert command("+method=adapter", *CHECKPOINTS, *SMALL)[0] == 0
    assert repeatable_result(out)["method"] == repeatable_result(out)["config"]["method.name"] == "houlsby"
    unseal(out)
    for path in out.rglob("config.yaml"):
        path.write_text(path.read_text().replace("name: houlsby", "name: adapter"))
    code, text = command("+method=houlsby", *CHECKPOINTS, *SMALL, "resume=latest", "trainer.steps=7")
    assert code == 0 and "going on after step 6" in text, text
    assert load_run(out).cfg.method.name == "houlsby"


@pytest.mark.parametrize("method", ["full", "dora"])
def test_early_stopping_ends_with_the_best_weights(command, terminal, tmp_path, method):
    """A learning rate that does harm: the first evaluation is the best."""
    settings = ["lr=0.3", "trainer.warmup=0", "trainer.eval_every=1", "trainer.checkpoint_every=1", *SMALL]
    stops = ["trainer.steps=9", "trainer.early_stopping_patience=2", "trainer.keep_best=true"]
    code, text = command(f"+method={method}", *settings, *stops, "trainer.schedule=constant")
    assert code == 0, text
    out = tmp_path / "out"
    heldout = {r["step"]: r["heldout_loss"] for r in repeatable_records(out) if "heldout_loss" in r and r["step"]}
    best = min(heldout, key=heldout.get)
    assert max(heldout) == best + 2 < 9
    assert (
        repeatable_result(out)["steps"],
        repeatable_result(out)["best_step"],
        repeatable_result(out)["loss_after"],
    ) == (
        best + 2,
        best,
        heldout[best],
    )
    assert f"best-{best:08}" in {path.name for path in (out / "checkpoints").iterdir()}

    loaded = load_run(out)
    heldout_again = load_data(loaded.cfg.data, loaded.tokenizer).heldout
    again = evaluate(loaded.model, heldout_again, 8, loaded.tokenizer.pad_token_id)
    assert again.loss == pytest.approx(heldout[best], rel=1e-6)


@pytest.mark.parametrize("method", ["full", "qdora"])
def test_a_checkpoint_can_be_loaded_as_a_run_can(command, tmp_path, method):
    assert command(f"+method={method}", *CHECKPOINTS, *SMALL, "lr=1e-2")[0] == 0
    ids = torch.arange(3, 40).unsqueeze(0)
    out = tmp_path / "out"
    whole, same, earlier = (load_run(path).model for path in (out, *checkpoints.of_run(out)[::-1]))
    with torch.inference_mode():
        assert torch.equal(whole(ids).logits, same(ids).logits)
        assert not torch.equal(whole(ids).logits, earlier(ids).logits)
