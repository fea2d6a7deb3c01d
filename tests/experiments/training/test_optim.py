"""The optimizer in a run: every choice trains, pages change nothing, a spike of memory evicts, bad input."""

import errno
import os
from pathlib import Path

import pytest
import torch

from experiments.config import resolve
from experiments.data.chat import Example
from experiments.models.load import load_model
from experiments.system.cli import composed
from experiments.training.loop import Trainer
from experiments.training.optim import make_optimizer, with_room
from modules import attach
from tests.experiments.helpers import records


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in records(directory) if "loss" in record]


def test_eight_bits_train_as_32_do_and_a_resumed_run_may_page(command, tmp_path):
    every = ["+method=full", "trainer.samples=0"]
    runs = {"fp32": ["optim=adamw"], "8-bit": ["optim=adamw8bit", "trainer.checkpoint_every=2"]}
    for name, own in runs.items():
        code, text = command(*every, *own, f"output_dir={tmp_path / name}")
        assert code == 0, text
    fp32, eight = (losses(tmp_path / name) for name in runs)
    assert eight == pytest.approx(fp32, rel=1e-3) and eight != fp32

    out = tmp_path / "8-bit"
    resume = [f"output_dir={out}", f"resume={out}/checkpoints/step-00000002"]
    code, text = command(*every, *runs["8-bit"], *resume, "optim.paged=true", "optim.budget_mb=4")
    assert code == 0, text
    assert losses(out) == eight
    assert not [path for path in out.iterdir() if "page" in path.name]


def test_a_spike_of_memory_evicts_and_changes_nothing(tmp_path):
    """From the third step on a forward pass has no room beside a single page. Dropout is on."""
    examples = [Example(ids, [-100] * 4 + ids[4:]) for ids in torch.randint(3, 200, (4, 24)).tolist()]
    evictions = []

    def run(*more: str) -> list[float]:
        cfg = resolve(composed("+method=lora", "model=tiny", "trainer=debug", f"output_dir={tmp_path}", *more))
        torch.manual_seed(0)
        model, _ = load_model(cfg.model, torch.float32, seed=0)
        attach(model, "lora", 4, dropout=0.3)
        trainer = Trainer(model.train(), cfg, torch.float32, pad_id=0)
        pages = trainer.optimizer.pages

        def out_of_memory(*_):
            if trainer.trained.steps >= 2 and pages is not None and pages.resident_bytes:
                evictions.append(trainer.trained.steps)
                raise torch.OutOfMemoryError("no room for activations")

        model.model.layers[1].register_forward_hook(out_of_memory)
        return [trainer.step([examples[:2], examples[2:]])[0]["loss"] for _ in range(4)]

    assert run() == run("optim.paged=true", "optim.budget_mb=4")
    assert evictions == [2, 3]


def test_without_pages_there_is_nothing_to_evict(tmp_path):
    def compute():
        raise torch.OutOfMemoryError("no room")

    cfg = resolve(composed("+method=lora", "model=tiny", f"output_dir={tmp_path}"))
    optimizer = make_optimizer(cfg, [torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        with_room(optimizer, torch.device("cpu"), compute)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optim=sgd"], "optim=sgd: no such optim; there are adamw, adamw8bit"),
        (["optim.name=lion"], "optim.name=lion: choose adamw or adamw8bit"),
        (["optim.paged=true"], r"optim.paged=true needs optim.budget_mb=N"),
        (["optim.paged=true", "optim.budget_mb=3"], "optim.budget_mb=3 is smaller than a page: choose 4 or more"),
        (["optim.budget_mb=64"], "optim.budget_mb=64 is for pages: add optim.paged=true"),
        (["optim.paged=true", "optim.budget_mb=4", "optim.host_mb=-1"], "optim.host_mb=-1: choose 0 or more"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(command, monkeypatch, overrides, message):
    monkeypatch.setattr("experiments.runs.one_run.prepare_model", None)
    code, text = command("+method=lora", *overrides)
    assert code == 1 and message in text
    assert len(text.strip().splitlines()) == 1


def test_a_full_disk_is_one_line(command, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    code, text = command("+method=lora", "optim.paged=true", "optim.budget_mb=4", "trainer.samples=0")
    assert code == 1
    assert "no room for the optimizer's pages" in text and "No space left on device" in text and "Traceback" not in text
    assert not (tmp_path / "out" / "result.json").exists()
