"""heldout.csv: the loss and the right answers of each held-out sample after training. Paired comparisons read it.

Rows of the set `heldout` are of the run's data, those of `second` of its second domain (data@second=…).
"""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy

from experiments.data.chat import Example
from experiments.system.files import HELDOUT, as_csv
from experiments.training.evaluation import SampleLoss
from modules.files.checked import verify_file

SETS = ("heldout", "second")
FLAGS = ("exact_match", "valid")  # of the answer to a sample
COLUMNS = ("set", "sample", "tokens", "loss", *FLAGS)  # loss in nats a token


def name_of(example: Example) -> str:
    """Ten hex digits that equal samples share, whatever their order."""
    return hashlib.sha256(repr(example.input_ids).encode()).hexdigest()[:10]


def as_rows(which: str, examples: list[Example], losses: list[SampleLoss], flags: dict[str, list[bool]]) -> list[dict]:
    """Rows for a set.

    Args:
        flags: by name, of each example; none for a set whose prompts are not answered.
    """
    rows = []
    for place, (example, loss) in enumerate(zip(examples, losses, strict=True)):
        row = {"set": which, "sample": name_of(example), "tokens": loss.tokens}
        row["loss"] = loss.nats / loss.tokens if loss.tokens else 0.0
        rows.append(row | {name: int(found[place]) for name, found in flags.items()})
    return rows


def text_of(rows: list[dict]) -> str:
    return as_csv(COLUMNS, rows)


@dataclass(frozen=True)
class Samples:
    """Measures of the samples of a set, by measure: arrays in the order of `names`.

    Attributes:
        names: of the samples.
        weights: how much each sample counts in the mean of a measure: its tokens in the loss, 1 in a share.
    """

    names: list[str]
    values: dict[str, numpy.ndarray]
    weights: dict[str, numpy.ndarray]


def read(directory: Path) -> dict[str, Samples]:
    """The samples in a run's heldout.csv, by set.

    Raises:
        ValueError: no such file, or not one that a run wrote.
    """
    path = directory / HELDOUT
    try:
        verify_file(path)
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {which: _samples([row for row in rows if row["set"] == which]) for which in SETS}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _samples(rows: list[dict]) -> Samples:
    values = {"loss": numpy.array([float(row["loss"]) for row in rows])}
    weights = {"loss": numpy.array([float(row["tokens"]) for row in rows])}
    for name in FLAGS:
        if rows and all(row[name] for row in rows):
            values[name] = numpy.array([float(row[name]) for row in rows])
            weights[name] = numpy.ones(len(rows))
    return Samples([row["sample"] for row in rows], values, weights)
