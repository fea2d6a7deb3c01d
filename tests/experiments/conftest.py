"""Runs of the command line inside the test process: an import of torch and transformers takes eight seconds."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from experiments import run
from experiments.config import ModelConfig, resolve
from experiments.models.load import load_model
from experiments.system.files import PROJECT_ROOT
from modules import quantize
from modules.files.bitsandbytes import save_bnb4

TINY = ["model=tiny", "trainer=debug", "rank=4", "trainer.dtype=float32"]  # the same on every processor
CHECKPOINTS = ["trainer.steps=6", "trainer.checkpoint_every=2", "trainer.grad_accum=2"]
SMALL = ["trainer.samples=1", "trainer.sample_tokens=4", "data.max_heldout=4"]


def composed(*overrides: str) -> DictConfig:
    """The configuration of a command line."""
    with initialize_config_dir(str(PROJECT_ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def write_chats(folder: Path) -> Path:
    """A JSON Lines file of forty short prompts and completions."""
    path = folder / "chats.jsonl"
    lines = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory) -> Path:
    """A run of six steps with checkpoints at steps 4 and 6; read it only."""
    folder = tmp_path_factory.mktemp("finished")
    where = ["data=jsonl", f"data.path={write_chats(folder)}", f"output_dir={folder / 'out'}"]
    run.run(resolve(composed("+method=qdora", *TINY, *CHECKPOINTS, *SMALL, "lr=1e-2", *where)))
    return folder / "out"


@pytest.fixture
def chats(tmp_path) -> Path:
    return write_chats(tmp_path)


@pytest.fixture
def terminal(monkeypatch, capsys):
    """terminal(command, *arguments) calls a module's `main`; returns (exit code, what it printed)."""

    def start(command: ModuleType, *arguments: str) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [command.__name__, *arguments])
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        text = printed.out + printed.err
        return (1, text + code) if isinstance(code, str) else (code, text)  # sys.exit("…") prints and means 1

    return start


@pytest.fixture
def command(terminal, tmp_path, chats):
    """command(*overrides) runs experiments.run on the tiny model; returns (exit code, what it printed)."""

    def start(*overrides: str) -> tuple[int, str]:
        given = [f"data.path={chats}", "data=jsonl"] if not any(o.startswith("data=") for o in overrides) else []
        where = [] if any(o.startswith("output_dir=") for o in overrides) else [f"output_dir={tmp_path / 'out'}"]
        arguments = sorted([*TINY, *given, *where, *overrides], key=lambda a: a.startswith("-"))  # flags come last
        return terminal(run, *arguments)

    return start


@pytest.fixture
def packed_tiny(tmp_path) -> Path:
    """A directory with the tiny model as bitsandbytes has it in NF4, blocksize 64 and double quantization."""
    model, tokenizer = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)
    quantize(model)
    save_bnb4(model, tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"
