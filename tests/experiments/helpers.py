"""Settings, files and comparisons that several tests share."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import ModelConfig
from experiments.models.load import load_model

TINY_MODEL = ModelConfig(name="tiny", source="tiny")
TINY = ["model=tiny", "trainer=debug", "rank=4", "trainer.dtype=float32"]  # the same on every processor
CHECKPOINTS = ["trainer.steps=6", "trainer.checkpoint_every=2", "trainer.grad_accum=2"]
SMALL = ["trainer.samples=1", "trainer.sample_tokens=4", "data.max_heldout=4"]
VARYING = {"tokens_per_s", "train_seconds", "total_seconds", "peak_memory_bytes", "machine"}  # machine has its load
VARYING |= {"commit"}  # which may change while a campaign runs


def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The tiny model in fp32, and its tokenizer."""
    return load_model(TINY_MODEL, torch.float32, seed=0)


def write_chats(folder: Path) -> Path:
    """A JSON Lines file of forty short prompts and completions."""
    path = folder / "chats.jsonl"
    lines = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(directory: Path) -> list[dict]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def repeatable_records(directory: Path) -> list[dict]:
    """The records without times: two runs of one configuration have the same ones."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records(directory)]


def result(directory: Path) -> dict:
    """The content of result.json."""
    return json.loads((directory / "result.json").read_text())


def repeatable_result(directory: Path) -> dict:
    """The result without times, memory and the machine's load."""
    return {key: value for key, value in result(directory).items() if key not in VARYING}


def tensors(directory: Path) -> dict[str, bytes]:
    """The bytes of each file of tensors, by its path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.safetensors")}


def unseal(directory: Path) -> None:
    """Delete the checksums of files that a test is about to change."""
    for path in directory.rglob("checksums.json"):
        path.unlink()


def assert_same(one: Path, other: Path) -> None:
    """Two runs have the same numbers and files."""
    assert repeatable_records(one) == repeatable_records(other)
    assert repeatable_result(one) == repeatable_result(other)
    assert tensors(one) == tensors(other)
    for name in ("samples.md", "config.yaml"):
        assert (one / name).read_text().replace(str(one), str(other)) == (other / name).read_text()


def nearest(w: np.ndarray, levels: np.ndarray, blocksize: int) -> np.ndarray:
    """Blockwise absmax quantization to the nearest level, by looking at all of them, in float64."""
    out = np.empty_like(w)
    for start in range(0, len(w), blocksize):
        block = w[start : start + blocksize]
        absmax = np.abs(block).max()
        out[start : start + blocksize] = absmax * levels[np.abs(block[:, None] / absmax - levels).argmin(axis=1)]
    return out


def csv_rows(path: Path) -> list[dict]:
    """The rows of a CSV file with a line of titles."""
    return list(csv.DictReader(path.open()))
