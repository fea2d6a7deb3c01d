"""Samples for training and evaluation, and the batches they are served in.

`load_data` turns a data config into token ids with labels. Four sources: docstrings (the default, see
docstrings.py), arithmetic (arithmetic.py), jsonl and text (the user's files, see user_files.py). A hash chooses the
held-out samples, so they are the same in every run and on every machine, whatever the order of the lines.

`batches` serves training samples for ever. The order of an epoch is a pure function of the seed and the epoch's
number: a run can continue from (epoch, batch) without replaying the batches before.
"""

import functools
import hashlib
import itertools
import json
import math
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiments.config import DataConfig
from experiments.data import arithmetic
from experiments.data.chat import IGNORED, Conversation, Example, encode, split
from experiments.data.docstrings import docstring_pairs
from experiments.data.template import chat_template
from experiments.data.text import text_blocks
from experiments.data.user_files import read_conversations
from experiments.errors import UserError

TASKS = {  # the system message of data that has one
    "docstrings": "Say in one sentence what the Python function does.",
    "arithmetic": arithmetic.TASK,
}
SOURCES = ("docstrings", "arithmetic", "jsonl", "text")
WINDOW_BATCHES = 32  # batches among which samples are sorted by length: more means less padding and less mixing


@dataclass(frozen=True)
class Data:
    """The samples that a run trains on and is measured on.

    Attributes:
        train: at least one example.
        heldout: at least one example. Split off by us, it shares no sample with `train` (docstrings: no module).
        note: one line for the terminal: how many, from where, how many were left out.
    """

    train: list[Example]
    heldout: list[Example]
    note: str

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that the same samples in the same order share."""
        digest = hashlib.sha256()
        for part in (self.train, self.heldout):
            for example in part:
                digest.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        return digest.hexdigest()[:16]


def load_data(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, split and tokenise the configured data.

    Args:
        cfg: the data config.
        tokenizer: of the model that is trained; chat data needs a fast one with a chat template.

    Returns:
        Training and held-out examples, each in an order that depends on their content only.

    Raises:
        UserError: a file, a line, a setting or the tokenizer is not fit; the message says which, and how to repair it.
    """
    _check(cfg)
    if cfg.source == "text":
        return _load_text(cfg, tokenizer)

    chat_template(tokenizer)  # there must be one
    ignored: set[str] = set()
    if cfg.source == "docstrings":
        conversations = _docstring_conversations()
    elif cfg.source == "arithmetic":
        conversations = _arithmetic_conversations(cfg.levels or arithmetic.LEVELS)
    else:
        conversations, ignored = read_conversations(cfg.path)
    if cfg.heldout_path:
        train = conversations
        heldout, ignored_in_heldout = read_conversations(cfg.heldout_path)
        ignored |= ignored_in_heldout
    else:
        train, heldout = _split(conversations, cfg)

    train_examples, train_note, train_dropped = _encode_part("training", train, cfg.max_train, cfg, tokenizer)
    heldout_examples, heldout_note, heldout_dropped = _encode_part("held-out", heldout, cfg.max_heldout, cfg, tokenizer)
    note = f"{cfg.name}: {train_note}, {heldout_note}"
    if dropped := train_dropped + heldout_dropped:
        note += f"; {dropped} longer than {cfg.max_length} tokens dropped"
    if ignored:
        note += f"; ignored keys: {', '.join(sorted(ignored))}"
    return Data(train_examples, heldout_examples, note)


def _check(cfg: DataConfig) -> None:
    """Raise UserError for values that the schema's types cannot exclude."""
    if cfg.source not in SOURCES:
        raise UserError(f"data.source={cfg.source} is not one of {', '.join(SOURCES)}")
    if cfg.too_long not in ("error", "drop", "truncate"):
        raise UserError(f"data.too_long={cfg.too_long} is not one of error, drop, truncate")
    if cfg.train_on not in ("all", "last"):
        raise UserError(f"data.train_on={cfg.train_on} is not one of all, last")
    if not 0 < cfg.heldout_fraction < 1:
        raise UserError(f"data.heldout_fraction={cfg.heldout_fraction} is not between 0 and 1")
    for name, least in ("max_length", 2), ("max_train", 1), ("max_heldout", 1):
        value = getattr(cfg, name)
        if value is not None and value < least:
            raise UserError(f"data.{name}={value} is less than {least}")
    if cfg.levels is not None:
        if cfg.source != "arithmetic":
            raise UserError(f"data={cfg.name} has no levels: leave data.levels out, or use data=arithmetic")
        if not cfg.levels or not set(cfg.levels) <= set(arithmetic.LEVELS):
            there = ", ".join(map(str, arithmetic.LEVELS))
            raise UserError(f"data.levels={cfg.levels}: choose some of {there}")
    if cfg.answer_tokens < 0:
        raise UserError(f"data.answer_tokens={cfg.answer_tokens} is less than 0")
    if cfg.answer_tokens and cfg.source == "text":
        raise UserError("data.answer_tokens: plain text has no prompts to answer: leave it out")
    generated = cfg.source in ("docstrings", "arithmetic")
    if generated and (cfg.path or cfg.heldout_path):
        raise UserError(
            f"data={cfg.name} reads no file: for {cfg.path or cfg.heldout_path} use data=jsonl or data=text"
        )
    if not generated and not cfg.path:
        raise UserError(f"data={cfg.name} needs data.path=FILE")


def _docstring_conversations() -> list[Conversation]:
    return [
        Conversation(
            [
                {"role": "system", "content": TASKS["docstrings"]},
                {"role": "user", "content": pair.source},
                {"role": "assistant", "content": pair.summary},
            ],
            where=f"{pair.module}:{pair.function}",
            group=pair.module,  # neighbours in a module are alike: train and held-out share none
        )
        for pair in docstring_pairs()
    ]


def _arithmetic_conversations(levels: Iterable[int]) -> list[Conversation]:
    return [
        Conversation(
            [
                {"role": "system", "content": TASKS["arithmetic"]},
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": str(problem.answer)},
            ],
            where=f"arithmetic, level {problem.level}: {problem.question}",
            group=problem.calculation,  # train and held-out share none
            level=problem.level,
        )
        for level in sorted(set(levels))
        for problem in arithmetic.problems(level)
    ]


def _position(key: str) -> float:
    """A number in [0, 1) that depends on the key only."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def _split(conversations: list[Conversation], cfg: DataConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations: about heldout_fraction of the groups is held out, and at least one."""
    positions = {conversation.group: _position(conversation.group) for conversation in conversations}
    cut = max(cfg.heldout_fraction, min(positions.values()))
    train = [conversation for conversation in conversations if positions[conversation.group] > cut]
    heldout = [conversation for conversation in conversations if positions[conversation.group] <= cut]
    if not train:
        raise UserError(
            f"{cfg.path or cfg.name}: {len(positions)} different samples are too few to hold out "
            f"{cfg.heldout_fraction:.0%} of them and train on the rest: add samples or set data.heldout_path=FILE"
        )
    return train, heldout


def _encode_part(
    part: str, conversations: list[Conversation], limit: int | None, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], str, int]:
    """The first `limit` examples by position (so a few are a fair sample), words for the note, and how many dropped."""
    examples: list[Example] = []
    groups: set[str] = set()
    dropped = used = 0
    for conversation in sorted(conversations, key=lambda c: _position(json.dumps(c.messages))):
        if len(examples) == limit:
            break
        used += 1
        found = [
            encode(one, tokenizer, cfg.max_length, cfg.too_long) for one in split(conversation, tokenizer, cfg.train_on)
        ]
        dropped += found.count(None)
        found = [example for example in found if example is not None]
        examples += found if limit is None else found[: limit - len(examples)]
        if found:
            groups.add(conversation.group)
    if not examples:
        raise UserError(f"{cfg.name}: every {part} sample is longer than data.max_length={cfg.max_length}: raise it")
    note = f"{len(examples)} of {len(conversations)} {part} samples"
    if len(examples) + dropped > used:
        note = f"{len(examples)} {part} samples, one a turn, of {used} conversations"
    if cfg.source == "docstrings":
        note += f" ({len(groups)} modules)"
    return examples, note, dropped


def _load_text(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    train, heldout = text_blocks(cfg, tokenizer)
    note = f"{cfg.name}: {len(train)} training and {len(heldout)} held-out blocks of at most {cfg.max_length} tokens"
    return Data(train, heldout, note)


def epoch_batches(examples: list[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    """One epoch's batches: every example once, those of similar length together, the batches in random order.

    Args:
        examples: the examples to serve.
        batch_size: examples a batch; one batch of an epoch is smaller where they do not divide evenly.
        seed: of the run.
        epoch: number of the epoch. The same arguments give the same batches.
    """
    rng = random.Random(f"{seed}, {epoch}")
    order = rng.sample(examples, len(examples))
    window = WINDOW_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), window):
        batches += _by_length(order[start : start + window], batch_size)
    rng.shuffle(batches)
    return batches


def batches(examples: list[Example], batch_size: int, seed: int, start: int = 0) -> Iterator[list[Example]]:
    """Training batches without end, epoch after epoch (see `epoch_batches`), but for the first `start`."""
    if not examples:
        raise ValueError("no examples to make batches of")
    first_epoch, served = divmod(start, math.ceil(len(examples) / batch_size))
    for epoch in itertools.count(first_epoch):
        yield from epoch_batches(examples, batch_size, seed, epoch)[served:]
        served = 0


def eval_batches(examples: list[Example], batch_size: int) -> list[list[Example]]:
    """Every example once, sorted by length, the longest first: a lack of memory shows at once."""
    return _by_length(examples, batch_size)[::-1]


def _by_length(examples: list[Example], batch_size: int) -> list[list[Example]]:
    """The examples from short to long, in batches."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
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
