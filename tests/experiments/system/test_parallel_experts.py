"""Mixtures of experts in two processes against one: losses, weights and files; experts sharded bit for bit."""

from pathlib import Path

import pytest
import torch

from experiments import run
from experiments.config import resolve
from experiments.models.load import prepare_model
from experiments.models.tiny import byte_tokenizer
from experiments.system import parallel
from experiments.system.cli import composed
from experiments.training.engines import engine_of
from modules.experts import ExpertsLinear, LoRAExperts, NF4Experts
from tests.experiments.helpers import write_chats
from tests.experiments.several_processes import processes, runs
from tests.experiments.system.test_parallel import SHORT, arguments, assert_same_training, bits, good, local
from tests.survey.small import build

METHODS = ("qdora", "lora")  # over packed and over dense experts


def job(folder: Path, name: str, *overrides: str) -> list[str]:
    return arguments(folder, name, "model=hf", f"model.path={folder / 'mixture'}", *overrides, *SHORT)


def placements(folder: Path) -> None:
    """In each process, which starts no run after it: a second start could meet the store of the first."""
    parallel.start()
    for method in METHODS:
        placed(folder, method)
    parallel.stop()


def placed(folder: Path, method: str) -> None:
    """Every tensor of the experts has the bits after `place` that it had before, and this process has half of them."""
    cfg = resolve(composed(*job(folder, "placed", f"+method={method}", "trainer.parallel=fsdp")))
    engine = engine_of(cfg, torch.device("cpu"))
    model, _ = prepare_model(cfg, engine.loads_on, torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRAExperts)}
    whole = {name: {n: t.clone() for n, t in layer.state_dict().items()} for name, layer in layers.items()}
    assert len(layers) == 4
    engine.place(model)
    for name, layer in layers.items():
        assert isinstance(layer.base, NF4Experts if method == "qdora" else ExpertsLinear)
        state = layer.state_dict()
        assert state.keys() == whole[name].keys()
        for key, tensor in state.items():
            if tensor.dim():  # the offset of double quantization is one number
                assert local(tensor).shape[0] <= -(-tensor.shape[0] // 2), (name, key)
            gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(bits(gathered), bits(whole[name][key])), (name, key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With `<method>-one`, `<method>-ddp` and `<method>-fsdp` in it."""
    folder = tmp_path_factory.mktemp("mixtures")
    write_chats(folder)
    model = build("qwen3_moe")
    model.save_pretrained(folder / "mixture")
    byte_tokenizer(model.config.vocab_size).save_pretrained(folder / "mixture")
    for method in METHODS:
        run.run(resolve(composed(*job(folder, f"{method}-one", f"+method={method}"))))
    modes = [(method, mode) for method in METHODS for mode in ("ddp", "fsdp")]
    jobs = [job(folder, f"{method}-{mode}", f"+method={method}", f"trainer.parallel={mode}") for method, mode in modes]
    good(processes(2, folder / "placed", placements, folder))
    good(processes(2, folder / "two", runs, jobs))
    return folder


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_experts_as_one_does(folder, method, mode):
    assert_same_training(folder / f"{method}-{mode}", folder / f"{method}-one")
    loads = [(folder / f"{method}-{name}" / "experts.csv").read_text() for name in (mode, "one")]
    assert loads[0] == loads[1] and loads[0].count("\n") == 3
