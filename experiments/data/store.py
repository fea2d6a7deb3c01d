"""Samples in flat arrays: one of all token ids, and for each sample where it ends in them.

A list of Python's integers takes 36 bytes a token, these arrays 5. Large ones are files that are mapped into memory,
so that a process holds no more of them than it reads. An `Example` is made when it is asked for.
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy import ndarray

from experiments.data.chat import IGNORED, Example

NONE = -1  # of a prompt or a level that is not there
DTYPES = {"ids": "int32", "labelled": "bool", "texts": "uint8", "lengths": "int64", "text_lengths": "int64"}
DTYPES |= {"prompts": "int64", "levels": "int8", "rows": "int64"}


@dataclass(frozen=True)
class Samples:
    """Any number of samples.

    Attributes:
        ids: the token ids of all.
        labelled: of each token, whether it counts in the loss.
        texts: the references of all in UTF-8.
        lengths, text_lengths: tokens and bytes of each sample.
        prompts: of each sample the tokens of its prompt.
        levels: of each sample its level.
        rows: of each sample the number of the row that it is made of.
    """

    ids: ndarray
    labelled: ndarray
    texts: ndarray
    lengths: ndarray
    text_lengths: ndarray
    prompts: ndarray
    levels: ndarray
    rows: ndarray

    @classmethod
    def of(cls, examples: Sequence[Example], rows: Sequence[int]) -> "Samples":
        texts = [(example.reference or "").encode("utf-8") for example in examples]
        columns = (
            [token for example in examples for token in example.input_ids],
            [label != IGNORED for example in examples for label in example.labels],
            numpy.frombuffer(b"".join(texts), numpy.uint8),
            [len(example.input_ids) for example in examples],
            [len(text) for text in texts],
            [NONE if example.prompt_ids is None else len(example.prompt_ids) for example in examples],
            [NONE if example.level is None else example.level for example in examples],
            rows,
        )
        return cls(*(numpy.asarray(column, dtype) for column, dtype in zip(columns, DTYPES.values())))

    @functools.cached_property
    def ends(self) -> ndarray:
        """Where each sample ends among all tokens."""
        return self.lengths.cumsum()

    @functools.cached_property
    def text_ends(self) -> ndarray:
        return self.text_lengths.cumsum()


class Writer:
    """Puts samples together, part by part.

    Args:
        folder: where to; None: in memory.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.files = {name: io.BytesIO() if folder is None else _file(folder, name).open("wb") for name in DTYPES}

    def add(self, part: Samples) -> None:
        for name, file in self.files.items():
            file.write(getattr(part, name).tobytes())

    def samples(self) -> Samples:
        """All of them."""
        if self.folder is None:
            return Samples(*(numpy.frombuffer(file.getvalue(), DTYPES[name]) for name, file in self.files.items()))
        for file in self.files.values():
            file.flush()
        return mapped(self.folder)


def mapped(folder: Path) -> Samples:
    """The samples that a `Writer` wrote to the folder."""
    return Samples(*(read_array(folder, name, dtype) for name, dtype in DTYPES.items()))


def read_array(folder: Path, name: str, dtype: str) -> ndarray:
    """An array in a file, mapped into memory."""
    file = _file(folder, name)
    return numpy.memmap(file, dtype, mode="r") if file.stat().st_size else numpy.empty(0, dtype)


def write_array(folder: Path, name: str, array: ndarray) -> None:
    array.tofile(_file(folder, name))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


class Examples(Sequence):
    """Samples in an order, read when they are asked for.

    Args:
        samples: where they are.
        places: int64, the numbers of those that these are, in order; by default all.
        shares: of each source, whose samples follow one another, how many there are, and how many an epoch has of them.
            None: an epoch has each sample once.
    """

    def __init__(self, samples: Samples, places: ndarray | None = None, shares: list[tuple[int, int]] | None = None):
        self.samples = samples
        self.places = numpy.arange(len(samples.lengths)) if places is None else places
        self.shares = shares

    @property
    def lengths(self) -> ndarray:
        """The tokens of each."""
        return self.samples.lengths[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: int | slice) -> Any:
        """The example at a place; of a slice a list."""
        if isinstance(which, slice):
            return [self._read(place) for place in range(len(self))[which]]
        return self._read(which)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    def tokens(self, which: int) -> tuple[ndarray, ndarray]:
        """The ids and labels of the example at a place."""
        place = self.places[which]
        end = self.samples.ends[place]
        start = end - self.samples.lengths[place]
        ids = self.samples.ids[start:end]
        return ids, numpy.where(self.samples.labelled[start:end], ids, IGNORED)

    def _read(self, which: int) -> Example:
        ids, labels = (part.tolist() for part in self.tokens(which))
        samples, place = self.samples, self.places[which]
        prompt, level, end = int(samples.prompts[place]), int(samples.levels[place]), samples.text_ends[place]
        reference = samples.texts[end - samples.text_lengths[place] : end].tobytes().decode("utf-8")
        return Example(
            ids,
            labels,
            None if prompt == NONE else ids[:prompt],
            None if prompt == NONE else reference,
            None if level == NONE else level,
        )


class Batches(Sequence):
    """Batches of examples, read when they are asked for.

    Args:
        places: of each batch, the places of its examples.
    """

    def __init__(self, examples: Sequence[Example], places: list[list[int]]):
        self.examples, self.places = examples, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: int | slice) -> Any:
        """The batch at a place, a list of examples; of a slice batches."""
        if isinstance(which, slice):
            return Batches(self.examples, self.places[which])
        return [self.examples[place] for place in self.places[which]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """The tokens of each example, which are not read for it if they are in flat arrays."""
    if isinstance(examples, Examples):
        return examples.lengths.tolist()
    return [len(example.input_ids) for example in examples]
