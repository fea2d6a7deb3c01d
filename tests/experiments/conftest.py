"""Runs of the command line inside the test process: an import of torch and transformers takes eight seconds."""

import json
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments import run

TINY = ["model=tiny", "trainer=debug", "rank=4"]


@pytest.fixture
def chats(tmp_path) -> Path:
    """A JSON Lines file of forty short prompts and completions."""
    path = tmp_path / "chats.jsonl"
    lines = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, chats):
    """command(*overrides) runs experiments.run on the tiny model; returns (exit code, what it printed)."""

    def start(*overrides: str) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        given = [f"data.path={chats}", "data=jsonl"] if not any(o.startswith("data=") for o in overrides) else []
        where = [] if any(o.startswith("output_dir=") for o in overrides) else [f"output_dir={tmp_path / 'out'}"]
        arguments = sorted([*TINY, *given, *where, *overrides], key=lambda a: a.startswith("-"))  # flags come last
        monkeypatch.setattr(sys, "argv", ["experiments.run", *arguments])
        code = 0
        try:
            run.cli()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        text = printed.out + printed.err
        return (1, text + code) if isinstance(code, str) else (code, text)  # sys.exit("…") prints and means 1

    return start
