"""From rows to samples: which rows are held out, in which order they come, and what tokens they become.

The rows are gone through twice. At first each is read and its place found by a hash: a mistake shows within seconds,
and the order depends on the content alone. Then those that are wanted become tokens. Texts are not kept in memory.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from experiments.config import DataConfig
from experiments.data.chat import Conversation, Example, TooLong, encode, split
from experiments.data.rows import Row
from experiments.data.sources import Source
from experiments.data.store import Samples, Writer
from experiments.data.user_files import conversation_of
from experiments.data.windows import Window
from experiments.errors import UserError
from experiments.system.progress import Count
from experiments.system.workers import in_order

PART = 200  # rows that a process is given at a time
NAMED = 3  # so many bad rows are named


@dataclass
class Bad:
    """Rows that are no sample: how many, and the reasons of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, reasons: list[str], count: int | None = None) -> None:
        self.count += len(reasons) if count is None else count
        self.first += reasons[: NAMED - len(self.first)]

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.first) else ""
        return f"{self.count} bad row{'s' if self.count > 1 else ''} skipped: {', '.join(self.first)}{more}"


@dataclass
class Index:
    """What is known of rows before they are tokens.

    Attributes:
        positions, groups: of each row, a number in [0, 1) that depends on its content, and one that its group shares;
            NaN for a bad row.
        sources: of each row, the number of its source.
        ignored: keys that no format uses.
        bad: rows that are no conversation.
    """

    positions: ndarray
    groups: ndarray
    sources: ndarray
    ignored: set[str]
    bad: Bad


@dataclass
class Part:
    """Training or held-out samples.

    Attributes:
        name: training or held-out.
        order: the numbers of its rows, as they come.
        limit: of its samples; None: all.
    """

    name: str
    order: ndarray
    limit: int | None
    take: int = 0  # so many of its rows are wanted

    def __post_init__(self) -> None:
        self.take = len(self.order) if self.limit is None else min(self.limit, len(self.order))


@dataclass
class Encoded:
    """How many samples each row has become, and how many were dropped as too long; those that became none as bad."""

    made: ndarray
    dropped: ndarray
    bad: Bad


def position(key: str) -> float:
    """A number in [0, 1) that depends on the key only."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def look(sources: list[Source], skip: bool, processes: int) -> Index:
    """Read all rows once.

    Raises:
        UserError: a file cannot be read; a row is no conversation, unless those are to be skipped.
    """
    positions, groups, counts = [], [], []
    ignored: set[str] = set()
    bad = Bad()
    with Count("reading", "rows") as progress:
        for number, source in enumerate(sources):
            counts.append(0)
            for found in in_order(functools.partial(_look, skip=skip), in_parts(source.rows()), processes):
                positions.append(found[0])
                groups.append(found[1])
                ignored |= found[2]
                bad.add(found[3])
                counts[number] += len(found[0])
                progress.advance(len(found[0]))
    return Index(
        numpy.concatenate(positions), numpy.concatenate(groups), numpy.repeat(numpy.arange(len(sources)), counts),
        ignored, bad,
    )  # fmt: skip


def in_parts(rows: Iterator[Row]) -> Iterator[list[Row]]:
    part = []
    for row in rows:
        part.append(row)
        if len(part) == PART:
            yield part
            part = []
    if part:
        yield part


def _look(rows: list[Row], skip: bool) -> tuple[ndarray, ndarray, set[str], list[str]]:
    """Of rows their positions and those of their groups, ignored keys, and what is wrong with the bad ones."""
    places, ignored, bad = numpy.full((2, len(rows)), numpy.nan), set(), []
    for i, row in enumerate(rows):
        try:
            conversation = _conversation(row, ignored)
        except ValueError as error:
            bad.append(bad_row(row, error, skip))
            continue
        places[:, i] = position(json.dumps(conversation.messages, default=str)), position(conversation.group)
    return *places, ignored, bad


def _conversation(row: Row, ignored: set[str]) -> Conversation:
    return row.value if isinstance(row.value, Conversation) else conversation_of(row, ignored)


def bad_row(row: Row | Window, error: ValueError, skip: bool) -> str:
    """What is wrong with a row, in one line. UserError: it is not to be skipped."""
    message = f"{row.where}: {error}"
    if not skip or isinstance(error, TooLong):  # data.too_long is about these
        raise UserError(message) from error
    return message


def parts_of(sources: list[Source], index: Index, cfg: DataConfig) -> tuple[Part, Part]:
    """Training rows, and those to measure on: the rows of sources that are held out, or of about heldout_fraction of
    the groups, and at least one. The validation part is split off likewise, of what is left without the held-out ones.

    Raises:
        UserError: there are too few to have both.
    """
    there = ~numpy.isnan(index.groups)
    if any(source.heldout for source in sources):
        held = numpy.array([source.heldout for source in sources])[index.sources]
    else:
        held = _lowest(index.groups, there, cfg.heldout_fraction)
        if cfg.part == "validation" and not cfg.heldout_path:
            there &= ~held
            held = _lowest(index.groups, there, 2 * cfg.heldout_fraction)
    train, heldout = there & ~held, there & held
    for rows, source in ((train, sources[0]), (heldout, sources[-1])):
        if not rows.any() and index.bad.count:
            raise UserError(f"{source.name}: too few good rows are left: {index.bad}")
    if not train.any():
        raise UserError(
            f"{sources[0].name}: {len(numpy.unique(index.groups[there]))} different samples are too few to hold out "
            f"{cfg.heldout_fraction:.0%} of them and train on the rest: add samples or set data.heldout_path=FILE"
        )

    def ordered(rows: ndarray) -> ndarray:
        numbers = rows.nonzero()[0]
        return numbers[index.positions[numbers].argsort(kind="stable")]

    return (
        Part("training", ordered(train), cfg.max_train),
        Part("held-out" if cfg.part == "heldout" else cfg.part, ordered(heldout), cfg.max_heldout),
    )


def _lowest(groups: ndarray, there: ndarray, bound: float) -> ndarray:
    """The rows whose group's number is at most `bound`, or the lowest there is."""
    return there & (groups <= max(bound, groups[there].min())) if there.any() else there


def tokens_of(
    sources: list[Source],
    rows: int,
    parts: tuple[Part, ...],
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    writer: Writer,
    processes: int,
) -> Encoded:
    """Write the samples of as many rows of each part as its limit takes.

    Args:
        rows: how many there are in all sources.
    """
    encoded = Encoded(numpy.zeros(rows, int), numpy.zeros(rows, int), Bad())
    work = functools.partial(_encode, cfg=cfg, tokenizer=tokenizer)
    done = numpy.zeros(rows, bool)
    while True:
        wanted = numpy.zeros(rows, bool)
        for part in parts:
            wanted[part.order[: part.take]] = True
        wanted &= ~done
        if not wanted.any():
            return encoded
        with Count("tokenizing", "rows", int(wanted.sum())) as progress:
            for numbers, samples, dropped, bad in in_order(work, _wanted(sources, wanted), processes):
                writer.add(samples)
                numpy.add.at(encoded.made, samples.rows, 1)
                encoded.dropped[numbers] = dropped
                encoded.bad.add(bad)
                progress.advance(len(numbers))
        done |= wanted
        for part in parts:  # rows that became no sample make room for others
            if part.limit is not None and encoded.made[part.order[: part.take]].sum() < part.limit:
                part.take = min(2 * part.take, len(part.order))


def _wanted(sources: list[Source], wanted: ndarray) -> Iterator[list[tuple[int, Row]]]:
    rows = (row for source in sources for row in source.rows())
    return in_parts((number, row) for number, row in enumerate(rows) if wanted[number])


def _encode(
    rows: list[tuple[int, Row]], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Samples, list[int], list[str]]:
    """The numbers of the rows, their samples, how many of each were dropped, and what is wrong with the bad ones."""
    examples: list[Example] = []
    made, dropped, bad = [], [], []
    for number, row in rows:
        found, lost = [], 0
        try:
            for one in split(_conversation(row, set()), tokenizer, cfg.train_on):
                example = encode(one, tokenizer, cfg.max_length, cfg.too_long, cfg.train_on)
                found += [] if example is None else [example]
                lost += example is None
        except ValueError as error:
            bad.append(bad_row(row, error, cfg.bad == "skip"))
            found, lost = [], 0
        examples += found
        made += [number] * len(found)
        dropped.append(lost)
    return [number for number, _ in rows], Samples.of(examples, made), dropped, bad


def places_of(part: Part, samples: Samples) -> ndarray:
    """The samples of a part's rows, as they come, up to its limit."""
    ranks = numpy.full(max(samples.rows.max(initial=-1), part.order.max(initial=-1)) + 1, -1)
    ranks[part.order] = numpy.arange(len(part.order))
    of_sample = ranks[samples.rows]
    places = (of_sample >= 0).nonzero()[0]
    return places[of_sample[places].argsort(kind="stable")][: part.limit]


def note_of(part: Part, encoded: Encoded, count: int) -> tuple[str, int, ndarray]:
    """Words on a part of `count` samples, how many of its samples were dropped, and the rows that it uses."""
    used = part.order[: part.take]
    if part.limit is not None:
        used = used[: int((encoded.made[used].cumsum() < part.limit).sum()) + 1]
    dropped = int(encoded.dropped[used].sum())
    if count + dropped > len(used):
        return f"{count} {part.name} samples, one a turn, of {len(used)} conversations", dropped, used
    return f"{count} of {len(part.order)} {part.name} samples", dropped, used


def shares_of(counts: list[int], sources: list[Source]) -> list[tuple[int, int]]:
    """Of each source how many samples it has, and how many an epoch has of them: together as many as there are.

    Raises:
        UserError: a source has none to give.
    """
    total, weights = sum(counts), [source.weight for source in sources if not source.heldout]
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    largest = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])  # the largest remainders first
    for i in largest[: total - sum(shares)]:
        shares[i] += 1
    for count, share, source in zip(counts, shares, sources):
        if share and not count:
            raise UserError(f"{source.name}: no training sample is left of this source, which has a weight")
    return list(zip(counts, shares))
