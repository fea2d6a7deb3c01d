"""A training loop with static steps on a CPU, and a double of CUDA graphs that finds what a capture would not allow."""

from collections.abc import Callable, Hashable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.config import Config, resolve
from experiments.data import buckets
from experiments.data.chat import Example
from experiments.data.samples import Data
from experiments.models.load import prepare_model
from experiments.system.cli import composed
from experiments.training import loop, step
from experiments.training.evaluation import Evaluation
from experiments.training.loop import Trainer

aten = torch.ops.aten
READ_BY_THE_HOST = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "lift_fresh"}


class NothingForTheHost(TorchDispatchMode):
    """Refuses operations whose results the host reads, or whose values come from the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in READ_BY_THE_HOST, f"{name} has the host wait"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


class ReplayedParts:
    """Runs a part eagerly, then "captures" it: from then on that first closure runs, whatever is passed."""

    def __init__(self, *_):
        self.seen: set[Hashable] = set()
        self.parts: dict[Hashable, Callable[[], None]] = {}
        self.replays = 0

    def run(self, key: Hashable, part: Callable[[], None]) -> None:
        if key not in self.seen:
            self.seen.add(key)
            part()
            return
        self.replays += key in self.parts
        with NothingForTheHost():
            self.parts.setdefault(key, part)()


@pytest.fixture
def static(monkeypatch):
    """Has a CPU be a GPU, for the loop alone."""
    for module in (loop, step):
        monkeypatch.setattr(module, "on_gpu", lambda model: True)
    monkeypatch.setattr(loop, "Graphs", ReplayedParts)
    monkeypatch.setattr(buckets, "MULTIPLE", 8)  # smaller batches


def data(count: int = 14, longest: int = 20) -> Data:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, longest + 1, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in lengths]
    examples = [Example(row, [-100] * 3 + row[3:]) for row in rows]
    return Data(examples[4:], examples[:4], "")


def config(folder: Path, *overrides: str) -> Config:
    settings = ["model=tiny", "rank=2", f"output_dir={folder}", "trainer.steps=5", "trainer.batch_size=2", "lr=0.01"]
    return resolve(composed(*settings, "trainer.checkpoint_every=0", "trainer.eval_every=4", *overrides))


def trained(cfg: Config, samples: Data, **faults: Callable) -> tuple[Trainer, list[dict]]:
    """The trainer after training, and its records without times."""
    torch.manual_seed(0)
    model, tokenizer = prepare_model(cfg, torch.device("cpu"), torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):  # zeros would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = Trainer(model, cfg, torch.float32, tokenizer.pad_token_id)
    records: list[dict] = []
    trainer.fit(samples, records.append, lambda: Evaluation(1.0, 0.0, 1), lambda: None, lambda: None)
    return trainer, [{name: value for name, value in record.items() if name != "seconds"} for record in records]
