"""Samples for training and evaluation, and the batches they are served in.

`load_data` turns a data config into token ids with labels. Six sources: docstrings (the default, see docstrings.py),
arithmetic (arithmetic.py), facts (facts.py), records (records.py), jsonl and text (the user's files, see rows.py and
user_files.py). A hash chooses the held-out samples, so they are the same in every run and on every machine, whatever
the order of the lines; facts and records come in parts of their own.

`batches` serves training samples for ever. The order of an epoch is a pure function of the seed and the epoch's
number: a run can continue from (epoch, batch) without replaying the batches before.
"""

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiments.config import DataConfig
from experiments.data import cache
from experiments.data.chat import IGNORED, Example
from experiments.data.chats import chat_samples
from experiments.data.named_templates import set_template
from experiments.data.settings import check
from experiments.data.sources import sources_of
from experiments.data.store import Batches, Examples, Writer, lengths_of
from experiments.data.template import chat_template
from experiments.data.text import text_blocks
from experiments.system import machine

LARGE = 2**20  # bytes of files from which on tokens are kept in the cache, and several processes make them
MOST_PROCESSES = 16  # that make tokens: one process reads what they all get
WINDOW_BATCHES = 32  # batches among which samples are sorted by length: more means less padding and less mixing


@dataclass(frozen=True)
class Data:
    """The samples that a run trains on and is measured on.

    Attributes:
        train: at least one example.
        heldout: at least one example. Split off by us, it shares no sample with `train` (docstrings: no module).
        note: one line for the terminal: how many, from where, how many were left out.
    """

    train: Examples
    heldout: Examples
    note: str

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that the same samples in the same order share."""
        digest = hashlib.sha256()
        for part in (self.train, self.heldout):
            for ids, labels in map(part.tokens, range(len(part))):
                digest.update(numpy.concatenate([[len(ids)], ids, labels], dtype="int64").tobytes())
        return digest.hexdigest()[:16]


def load_data(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, trains: bool = False) -> Data:
    """Read, split and tokenise the configured data. Tokens of large files are in the cache afterwards.

    Args:
        cfg: the data config.
        tokenizer: of the model that is trained; chat data needs a fast one with a chat template. It gets the template
            that `cfg` names.
        trains: the data is to be trained on, not only measured on.

    Returns:
        Training and held-out examples, each in an order that depends on their content only.

    Raises:
        UserError: a file, a line, a setting or the tokenizer is not fit; the message says which, and how to repair it.
    """
    check(cfg, trains)
    set_template(cfg, tokenizer)
    if cfg.source != "text":
        chat_template(tokenizer)  # there must be one
    sources = sources_of(cfg)
    large = sum(source.bytes for source in sources) >= LARGE
    processes = min(machine.usable_cores(), MOST_PROCESSES) if large else 1

    def make(writer: Writer) -> cache.Made:
        of_kind = text_blocks if cfg.source == "text" else chat_samples
        return of_kind(sources, cfg, tokenizer, writer, processes)

    if not large:
        return Data(*cache.examples_of(make(Writer())))
    files = [(file, source.weight, source.heldout) for source in sources for file in source.files]
    return Data(*cache.cached(cfg, tokenizer, files, make))


def epoch_batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> Batches:
    """One epoch's batches: examples of similar length together, the batches in random order.

    Args:
        examples: the examples to serve, every one once; of sources with shares (store.py) as many as theirs.
        batch_size: examples a batch; one batch of an epoch is smaller where they do not divide evenly.
        seed: of the run.
        epoch: number of the epoch. The same arguments give the same batches.
    """
    rng = random.Random(f"{seed}, {epoch}")
    served = served_places(examples, seed, epoch)
    order = rng.sample(served, len(served))
    window = WINDOW_BATCHES * batch_size
    lengths = lengths_of(examples)
    batches = []
    for start in range(0, len(order), window):
        batches += _by_length(order[start : start + window], lengths, batch_size)
    rng.shuffle(batches)
    return Batches(examples, batches)


def served_places(examples: Sequence[Example], seed: int, epoch: int) -> Sequence[int]:
    """The places of the examples that an epoch has. A source with shares is gone through again and again, each time in
    another order, and an epoch goes on where the last one ended: no sample is served twice as often as another."""
    shares = getattr(examples, "shares", None)
    if shares is None:
        return range(len(examples))
    served, first = [], 0
    for number, (count, share) in enumerate(shares):
        again, skipped = divmod(epoch * share, count) if count else (0, 0)
        rounds = (
            random.Random(f"{seed}, source {number}, {time}").sample(range(first, first + count), count)
            for time in itertools.count(again)
        )
        served += itertools.islice(itertools.chain.from_iterable(rounds), skipped, skipped + share)
        first += count
    return served


def batches(examples: Sequence[Example], batch_size: int, seed: int, start: int = 0) -> Iterator[list[Example]]:
    """Training batches without end, epoch after epoch (see `epoch_batches`), but for the first `start`."""
    if not examples:
        raise ValueError("no examples to make batches of")
    first_epoch, served = divmod(start, math.ceil(len(examples) / batch_size))
    for epoch in itertools.count(first_epoch):
        yield from epoch_batches(examples, batch_size, seed, epoch)[served:]
        served = 0


def eval_batches(examples: Sequence[Example], batch_size: int) -> Batches:
    """Every example once, sorted by length, the longest first: a lack of memory shows at once."""
    return Batches(examples, _by_length(range(len(examples)), lengths_of(examples), batch_size)[::-1])


def _by_length(places: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The places of examples from short to long, in batches."""
    ordered = sorted(places, key=lengths.__getitem__)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def collate(batch: list[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch as int64 tensors, padded on the right.

    Args:
        batch: B examples, of which the longest has T tokens.
        pad_id: token to pad `input_ids` with; any will do, as neither attention nor the loss sees it.

    Returns:
        input_ids [B, T]; attention_mask [B, T], 1 where there is a token; labels [B, T], IGNORED where none counts.
    """
    longest = max(len(example.input_ids) for example in batch)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in batch], pad_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in batch], 0),
        "labels": padded([example.labels for example in batch], IGNORED),
    }
