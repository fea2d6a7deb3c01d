"""Runs of the command line inside the test process: an import of torch and transformers takes eight seconds."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from experiments import run, tune_blocks
from experiments.config import DataConfig, resolve
from experiments.system.cli import composed
from modules import quantize
from modules.files.bitsandbytes import save_bnb4
from tests.experiments.helpers import CHECKPOINTS, SMALL, TINY, TINY_MODEL, tiny, write_chats
from tests.experiments.made_up_results import LOSSES, write_run

get_mode = Hydra.get_mode


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
        # Hydra composes everything once more to find the mode, a tenth of these tests' time
        is_open = any(argument.startswith(("-", "sweep=", "hydra.")) for argument in arguments)
        monkeypatch.setattr(Hydra, "get_mode", get_mode if is_open else lambda *args, **named: RunMode.RUN)
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
    model, tokenizer = tiny()
    quantize(model)
    save_bnb4(model, tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture(scope="session")
def profile_file(tmp_path_factory):
    """profile.csv and map.yaml of the tiny model."""
    folder = tmp_path_factory.mktemp("profile")
    cfg = tune_blocks.TuneConfig(
        model=TINY_MODEL, data=DataConfig(name="arithmetic", source="arithmetic"), samples=2, candidates=[32, 64],
        output_dir=str(folder), bits=4.2, dtype="float32",
    )  # fmt: skip
    tune_blocks.tune(cfg)
    return folder


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder of made-up results: two methods at two ranks and full fine-tuning, three seeds each."""
    for (method, rank), losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path, method, seed, loss, rank=rank, train_seconds=100.0 if method == "lora" else 120.0)
    for seed, loss in enumerate([2.86, 2.89, 2.88]):
        write_run(tmp_path, "full", seed, loss, peak_memory_bytes=9 * 10**9)
    return tmp_path
