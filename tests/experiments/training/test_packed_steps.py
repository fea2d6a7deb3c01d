"""Training on packs: loss and gradients of the samples one by one in every method; runs, resume, bad input."""

import re

import pytest
import torch

from experiments.config import resolve
from experiments.data.buckets import Bucket, pack_bucket
from experiments.data.chat import IGNORED, Example
from experiments.data.packing import epoch_packs
from experiments.data.samples import collate
from experiments.models.load import prepare_model
from experiments.system import parallel
from experiments.system.cli import composed
from experiments.training.gradients import accumulate
from experiments.training.loop import Trainer
from modules.fused import attention
from tests.experiments.helpers import CHECKPOINTS, SMALL, TINY, records, tensors, write_chats
from tests.experiments.several_processes import processes, runs
from tests.experiments.training.static_steps import config, data, static, trained  # noqa: F401
from tests.experiments.training.varlen import varlen_reference

METHODS = ("lora", "qlora", "dora", "qdora", "full", "bitfit", "houlsby")
TOKENS = 64


def samples(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 30, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in lengths]
    prompts = [1 + i % 3 for i in range(count)]
    return [Example(row, [IGNORED] * prompt + row[prompt:]) for row, prompt in zip(rows, prompts)]


def trainer(*overrides: str) -> Trainer:
    packing = ["data.packing=true", f"trainer.tokens={TOKENS}"]
    cfg = resolve(composed("model=tiny", "rank=4", "output_dir=.", *packing, *overrides))
    torch.manual_seed(0)
    model, tokenizer = prepare_model(cfg, torch.device("cpu"), torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(("lora_B", "adapter_up")):  # zeros would leave others without
            torch.nn.init.normal_(parameter, std=0.1)
    return Trainer(model.train(), cfg, torch.float32, tokenizer.pad_token_id)


def gradients(run: Trainer, group: list[list[Example]]) -> tuple[float, list[torch.Tensor]]:
    loss = accumulate(run.label_loss, group, run.pad_id, run.dtype, run.scaler, run.engine, run.packing)
    return loss, [p.grad for p in run.parameters]


def one_by_one(run: Trainer, group: list[list[Example]]) -> tuple[float, list[torch.Tensor]]:
    """The mean over the labelled tokens of all samples, each in a forward pass of its own, added up in float64."""
    flat = [example for pack in group for example in pack]
    labelled = sum(label != IGNORED for example in flat for label in example.labels[1:])
    total, sums = 0.0, [torch.zeros_like(p, dtype=torch.float64) for p in run.parameters]
    for example in flat:
        loss = run.label_loss(collate([example], run.pad_id)) / labelled
        total += loss.item()
        for sum_, gradient in zip(sums, torch.autograd.grad(loss, run.parameters)):
            sum_ += gradient
    return total, sums


def assert_close(found: tuple[float, list[torch.Tensor]], want: tuple[float, list[torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(want[0], rel=1e-6)
    scale = torch.stack([gradient.norm() for gradient in want[1]]).norm()
    for gradient, other in zip(found[1], want[1], strict=True):
        assert (gradient - other).norm() <= 1e-6 * scale


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_the_samples_one_by_one(method, checkpointing):
    run = trainer(f"+method={method}", f"trainer.gradient_checkpointing={checkpointing}", "trainer.grad_accum=2")
    group = list(epoch_packs(samples(), TOKENS, seed=0, epoch=0))[:2]
    assert sum(map(len, group)) > 4
    assert_close(gradients(run, group), one_by_one(run, group))


def test_every_step_has_one_shape(monkeypatch):
    run, shapes = trainer("+method=lora"), set()
    run.model.register_forward_pre_hook(lambda _, args, given: shapes.add(given["input_ids"].shape), with_kwargs=True)
    for pack in epoch_packs(samples(), TOKENS, seed=0, epoch=0):
        run.step([pack])
    assert shapes == {(1, TOKENS)}


def test_processes_compute_their_samples_alone(monkeypatch):
    run = trainer("+method=lora")
    pack = epoch_packs(samples(), TOKENS, seed=0, epoch=0)[0]
    monkeypatch.setattr(parallel, "size", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        seen += run.packing.batch(pack, run.pad_id)["input_ids"][0].tolist()
    assert sorted(seen) == sorted(token for example in pack for token in example.input_ids)
    alone = run.packing.batch(pack[:1], run.pad_id)  # for the second process none is left
    assert (alone["labels"] == IGNORED).all()


PACKED = ["data.packing=true", "trainer.tokens=96", "data=jsonl", *TINY]


def test_a_resumed_run_is_the_same_bit_for_bit(command, tmp_path):
    given = ["+method=qdora", *PACKED, f"data.path={write_chats(tmp_path)}", *CHECKPOINTS, *SMALL, "dropout=0.1"]
    given += ["trainer.schedule=constant", "trainer.warmup=0"]
    code, text = command(*given, f"output_dir={tmp_path / 'whole'}")
    assert code == 0 and re.search(r"packing: \d+ packs an epoch of up to 96 tokens, \d+\.\d% of them padding\n", text)
    part = [*given, f"output_dir={tmp_path / 'part'}"]
    assert command(*part, "trainer.steps=4")[0] == 0
    assert command(*part, "resume=latest")[0] == 0
    assert tensors(tmp_path / "part" / "adapter") == tensors(tmp_path / "whole" / "adapter")
    code, text = command(*part, "trainer.tokens=128", "trainer.steps=8", "resume=latest")
    assert code == 1 and "is of another configuration: trainer.tokens (96 there, 128 here)" in text


def test_several_processes_train_as_one(command, tmp_path):
    """With few samples in a pack, so that a process has none at times."""
    given = ["+method=qdora", *PACKED, f"data.path={write_chats(tmp_path)}", "trainer.tokens=64", "trainer.device=cpu"]
    given += ["trainer.steps=3", "trainer.grad_accum=2", "trainer.eval_every=0", "trainer.samples=0", "lr=3e-3"]
    assert command(*given, f"output_dir={tmp_path / 'one'}")[0] == 0
    two = [[*given, f"trainer.parallel={mode}", f"output_dir={tmp_path / mode}"] for mode in ("ddp", "fsdp")]
    ended = processes(2, tmp_path / "two", runs, two)
    assert [process.exitcode for process in ended] == [0, 0], ended
    for mode in ("ddp", "fsdp"):
        for record, other in zip(records(tmp_path / "one"), records(tmp_path / mode), strict=True):
            assert other | {"seconds": 0} == pytest.approx(record | {"seconds": 0}, rel=1e-4)


@pytest.mark.parametrize(
    "given, message",
    [
        (["trainer.tokens=8", "data.packing=true"], "a sample has 49 tokens and a pack trainer.tokens=8: set trainer."),
        (["trainer.tokens=64"], "trainer.tokens=64 is for packs: add data.packing=true"),
        (["trainer.tokens=0", "data.packing=true"], "trainer.tokens=0: choose 1 or more"),
        (["+method=prefix_embed", "prefix_tokens=2", "data.packing=true"], "virtual tokens of method=prefix_embed"),
        (["+method=prefix_layer", "prefix_tokens=2", "data.packing=true"], "virtual tokens of method=prefix_layer"),
        (["data@second=docstrings", "second.packing=true"], "second.…: data.packing=true is about training"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, given, message):
    method = [] if any("method" in one for one in given) else ["+method=lora"]
    code, text = command(*method, *TINY, "data=jsonl", f"data.path={write_chats(tmp_path)}", *given)
    assert code == 1 and message in text and "Traceback" not in text, text


# ------------------------------------------------------------------------------------------ as on a GPU


@pytest.fixture(params=["masks", "varlen"])
def kept_apart(request, monkeypatch):
    if request.param == "varlen":
        monkeypatch.setattr(attention, "varlen_attn", varlen_reference)


GPU = ["data.packing=true", "trainer.tokens=40", "trainer.grad_accum=2"]


@pytest.mark.usefixtures("static", "kept_apart")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_one_graph_serves_all_steps(tmp_path, checkpointing):
    """Replayed steps are the eager ones bit for bit, and within rounding those that the host watches."""
    overrides = ["+method=qdora", *GPU, f"trainer.gradient_checkpointing={checkpointing}"]
    own = data(count=24)
    replayed, their_records = trained(config(tmp_path, *overrides), own)
    parts = [key for key in replayed.static.graphs.parts if isinstance(key, Bucket)]
    assert parts == replayed.static.buckets and replayed.static.graphs.replays > 5
    _, eager_records = trained(config(tmp_path, *overrides, "trainer.cuda_graphs=false"), own)
    assert eager_records == their_records and len(eager_records) == 5


@pytest.mark.usefixtures("static", "kept_apart")
def test_static_packs_are_the_samples_one_by_one(tmp_path):
    run = trainer("+method=qdora", "trainer.grad_accum=2")
    assert run.packing.inputs.__name__ in ("positions_and_masks", "_positions_and_boundaries")
    group = list(epoch_packs(samples(), TOKENS, seed=0, epoch=0))[:2]
    run.static.buckets = [pack_bucket(samples(), TOKENS, seed=0)]
    run.static.add_gradients(group, run.pad_id)
    found = float(run.static.total), [p.grad.clone() for p in run.parameters]
    assert_close(found, one_by_one(run, group))
    run.optimizer.zero_grad()
    run.static.buckets = []  # a pack that no bucket holds has its own shape
    run.static.add_gradients(group, run.pad_id)
    assert_close((float(run.static.total), [p.grad for p in run.parameters]), found)
