"""The optimizer in a run: every choice trains, pages change nothing, a spike of memory evicts, bad input."""

import errno
import os

import pytest
import torch

from experiments import train as training
from experiments.config import resolve
from experiments.data import Data
from experiments.data_chat import Example
from experiments.models import load_model
from experiments.optim import with_room
from modules import attach
from tests.experiments.test_run import composed, records


def test_eight_bits_in_pages_train_as_32_do(command, tmp_path):
    losses = []
    for name, *overrides in ("fp32",), ("8-bit", "optim=adamw8bit", "optim.paged=true", "optim.budget_mb=4"):
        code, text = command("+method=full", "trainer.samples=0", f"output_dir={tmp_path / name}", *overrides)
        assert code == 0, text
        losses.append([record["loss"] for record in records(tmp_path / name) if "loss" in record])
        assert not [path for path in (tmp_path / name).iterdir() if "page" in path.name]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[1] != losses[0]


def test_a_spike_of_memory_evicts_and_changes_nothing(monkeypatch, tmp_path):
    """From the third step on a forward pass has no room beside a single page. Dropout is on."""
    overrides = ["model=tiny", "trainer=debug", "trainer.grad_accum=2", "trainer.eval_every=0", "lr=1e-2"]
    examples = [Example(ids, [-100] * 4 + ids[4:]) for ids in torch.randint(3, 200, (16, 24)).tolist()]
    optimizers, evictions = [], []
    make = training.make_optimizer
    monkeypatch.setattr(training, "make_optimizer", lambda *args: optimizers.append(make(*args)) or optimizers[-1])

    def losses(*more: str) -> list[float]:
        def out_of_memory(*_):
            pages = optimizers[-1].pages
            if len(log) >= 2 and pages is not None and pages.resident_bytes:
                evictions.append(len(log))
                raise torch.OutOfMemoryError("no room for activations")

        cfg = resolve(composed("+method=lora", *overrides, f"output_dir={tmp_path}", *more))
        torch.manual_seed(0)
        model, _ = load_model(cfg.model, torch.float32, seed=0)
        attach(model, "lora", 4, dropout=0.3)
        model.model.layers[1].register_forward_hook(out_of_memory)
        log: list[dict] = []
        training.train(model, Data(examples, [], ""), cfg, torch.float32, 0, log.append, training.Trained())
        return [record["loss"] for record in log]

    assert losses() == losses("optim.paged=true", "optim.budget_mb=4")
    assert evictions == [2, 3]


def test_without_pages_there_is_nothing_to_evict(tmp_path):
    def compute():
        raise torch.OutOfMemoryError("no room")

    cfg = resolve(composed("+method=lora", "model=tiny", f"output_dir={tmp_path}"))
    optimizer = training.make_optimizer(cfg, [torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        with_room(optimizer, torch.device("cpu"), compute)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optim=sgd"], "Could not find 'optim/sgd'"),
        (["optim.name=lion"], "optim.name=lion: choose adamw or adamw8bit"),
        (["optim.paged=true"], r"optim.paged=true needs optim.budget_mb=N"),
        (["optim.paged=true", "optim.budget_mb=3"], "optim.budget_mb=3 is smaller than a page: choose 4 or more"),
        (["optim.budget_mb=64"], "optim.budget_mb=64 is for pages: add optim.paged=true"),
        (["optim.paged=true", "optim.budget_mb=4", "optim.host_mb=-1"], "optim.host_mb=-1: choose 0 or more"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(command, monkeypatch, overrides, message):
    monkeypatch.setattr("experiments.run.load_model", None)
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
