"""Static steps: the same numbers whether they are replayed or not, and nothing in them that a capture refuses."""

import math

import pytest
import torch

from experiments.config import resolve
from experiments.errors import UserError
from experiments.runs import one_run
from experiments.system.cli import composed
from experiments.training import loop, step
from experiments.training.graphs import Eager, cannot_capture
from tests.experiments.helpers import SMALL, TINY, records, write_chats
from tests.experiments.training.static_steps import ReplayedParts, config, data, static, trained  # noqa: F401

FEATURES = {
    "full": ["+method=full"],
    "lora": ["+method=lora", "dropout=0.2"],
    "qlora-8bit": ["+method=qlora", "optim=adamw8bit", "trainer.loraplus_lr_ratio=4"],
    "dora": ["+method=dora"],
    "qdora-all": [
        *("+method=qdora", "trainer.gradient_checkpointing=true", "dropout=0.1", "trainer.grad_accum=2"),
        *("optim=adamw8bit", "trainer.weight_decay=0.1", "trainer.max_grad_norm=0.5"),
    ],
    "prefix": ["+method=prefix_layer", "prefix_tokens=2", "infix_tokens=1"],
    "houlsby": ["+method=houlsby"],
    "bitfit": ["+method=bitfit"],
}


@pytest.mark.usefixtures("static")
@pytest.mark.parametrize("overrides", FEATURES.values(), ids=FEATURES)
def test_replayed_steps_are_the_eager_ones_bit_for_bit(overrides, tmp_path):
    samples = data()
    replayed, their_records = trained(config(tmp_path, *overrides), samples)
    eager, own_records = trained(config(tmp_path, *overrides, "trainer.cuda_graphs=false"), samples)
    assert isinstance(replayed.static.graphs, ReplayedParts) and isinstance(eager.static.graphs, Eager)
    assert replayed.static.graphs.replays > 5 and len(own_records) == 5
    assert own_records == their_records
    for p, q in zip(replayed.parameters, eager.parameters):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("static")
@pytest.mark.parametrize("name", ["full", "qdora-all", "prefix"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_static_steps_are_those_that_the_host_watches(name, padded, tmp_path, monkeypatch):
    """Bit for bit where every batch keeps its shape. Padded, up to rounding; other elements are dropped then."""
    samples = data(longest=20 if padded else 6)
    overrides = [*FEATURES[name], "trainer.cuda_graphs=false", *["dropout=0"] * padded]
    if not padded:
        monkeypatch.setattr(loop, "buckets", lambda *_: [])
    static_steps, their_records = trained(config(tmp_path, *overrides), samples)
    for module in (loop, step):
        monkeypatch.setattr(module, "on_gpu", lambda model: False)
    watched, own_records = trained(config(tmp_path, *overrides), samples)
    assert watched.static is None and static_steps.static is not None
    for one, other in zip(own_records, their_records, strict=True):
        assert one == (pytest.approx(other, rel=1e-4) if padded else other)
    for p, q in zip(watched.parameters, static_steps.parameters):
        assert padded or torch.equal(p, q)


@pytest.mark.usefixtures("static")
@pytest.mark.parametrize("value, at", [(math.nan, 1), (math.inf, 3), (math.nan, 4)])
def test_what_is_not_finite_never_reaches_weights_or_state(value, at, tmp_path, monkeypatch):
    """The host learns of it a step later, and that step changes nothing either."""
    constant = ["trainer.schedule=constant", "trainer.warmup=0", "trainer.eval_every=0"]
    good, _ = trained(config(tmp_path, "+method=qdora", *constant, f"trainer.steps={max(1, at - 1)}"), data())
    steps, run = [], loop.Trainer.step

    def faulty(self, group):
        steps.append(self)
        if len(steps) != at:
            return run(self, group)
        hook = self.parameters[0].register_hook(lambda gradient: gradient * value)
        self.static.graphs = Eager()  # a replay would not call the hook
        try:
            return run(self, group)
        finally:
            hook.remove()

    monkeypatch.setattr(loop.Trainer, "step", faulty)
    where = rf"the gradients became (nan|inf) at step {at}, under a loss of .* weights of step {at - 1};"
    with pytest.raises(UserError, match=where):
        trained(config(tmp_path, "+method=qdora", *constant, "trainer.steps=6"), data())
    trainer = steps[-1]
    assert trainer.trained.steps == at - 1 and len(steps) == at + 1
    assert all(p.isfinite().all() for p in trainer.parameters)
    if at > 1:
        assert trainer.trained.tokens == good.trained.tokens
        assert all(torch.equal(p, q) for p, q in zip(trainer.parameters, good.parameters))


@pytest.mark.usefixtures("static")
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    where = [f"data.path={write_chats(tmp_path)}", "data=jsonl", "+method=qdora", *TINY, *SMALL, "dropout=0.1"]
    where += ["trainer.grad_accum=2", "trainer.gradient_checkpointing=true", "trainer.schedule=constant"]
    steps = lambda n: [f"trainer.steps={n}", "trainer.checkpoint_every=1", "trainer.warmup=0"]  # noqa: E731
    for name, first in (("whole", 4), ("part", 2)):
        one_run.run(resolve(composed(*where, *steps(first), f"output_dir={tmp_path / name}")))
    one_run.run(resolve(composed(*where, *steps(4), f"output_dir={tmp_path / 'part'}", "resume=latest")))
    assert [r["step"] for r in records(tmp_path / "part") if "lr" in r] == [1, 2, 3, 4]
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-00000004/training.safetensors"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_where_graphs_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cuda_graphs=true cannot be: the model is not on a CUDA device; leave it out"):
        trained(config(tmp_path, "+method=lora", "trainer.cuda_graphs=true"), data())
    with pytest.raises(UserError, match=r"trainer\.cuda_graphs=maybe: choose auto, true or false"):
        config(tmp_path, "+method=lora", "trainer.cuda_graphs=maybe")


@pytest.mark.usefixtures("static")
def test_what_runs_eagerly_is_named(tmp_path, capsys):
    overrides, reason = ["optim.paged=true", "optim.budget_mb=8"], "optim.paged=true moves state"
    _, own_records = trained(config(tmp_path, "+method=lora", *overrides, "trainer.steps=2"), data())
    assert f"steps run eagerly, not in CUDA graphs: {reason}" in capsys.readouterr().out
    assert len(own_records) == 2
    with pytest.raises(UserError, match=f"trainer.cuda_graphs=true cannot be: {reason}"):
        trained(config(tmp_path, "+method=lora", *overrides, "trainer.cuda_graphs=true"), data())


def test_reasons(tmp_path, monkeypatch):
    """Each that the host must know of, and each that a capture cannot have."""
    trainer, _ = trained(config(tmp_path, "+method=lora", "trainer.steps=1"), data())
    loss, cfg = trainer.label_loss, config(tmp_path, "+method=lora", "trainer.gradient_checkpointing=true")
    assert step.needs_the_host(cfg, loss, torch.float32) == "the model is not on a CUDA device"
    monkeypatch.setattr(step, "on_gpu", lambda model: True)
    assert step.needs_the_host(cfg, loss, torch.float32) is None
    assert "float16" in step.needs_the_host(cfg, loss, torch.float16)
    compiled = config(tmp_path, "+method=lora", "trainer.compile=true")
    assert "trainer.compile=true" in step.needs_the_host(compiled, loss, torch.float32)
    model = loss.model
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "_attn_implementation_internal", "eager")
        assert "needs a mask" in step.needs_the_host(cfg, loss, torch.float32)
    with monkeypatch.context() as patch:  # attention that sees what comes later
        for module in model.modules():
            if hasattr(module, "is_causal"):
                patch.setattr(module, "is_causal", False)
        assert "needs a mask" in step.needs_the_host(cfg, loss, torch.float32)

    assert cannot_capture(cfg, model) is None
    model.config.attention_dropout = 0.1
    assert "own dropout (attention_dropout=0.1)" in cannot_capture(cfg, model)
    model.config.attention_dropout = 0.0
    model.model.norm.register_forward_hook(lambda *_: None)
    assert "model.norm has a hook" in cannot_capture(cfg, model)


@pytest.mark.usefixtures("static")
def test_a_text_longer_than_the_window_has_its_mask(tmp_path, monkeypatch):
    """Such a batch runs eagerly, and sees the same as where the host watches."""
    samples, own_window = data(longest=20), lambda model: 10
    monkeypatch.setattr(step, "_window", own_window)
    trainer, their_records = trained(config(tmp_path, "+method=lora"), samples)
    assert all(key is None or key[0] in ("begin", "update") or key.length < 10 for key in trainer.static.graphs.parts)
    assert len(their_records) == 5
