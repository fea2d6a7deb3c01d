"""Plain text in blocks of max_length tokens, each token labelled.

A file of text, or the `text` of a row, is a document. A block begins as the tokenizer begins a text (with BOS, or with
nothing), and a document ends with EOS. The documents of a source follow one another.
"""

import functools
from collections.abc import Iterator

import numpy
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from experiments.config import DataConfig
from experiments.data.cache import Made
from experiments.data.messages import kind, read_text_of
from experiments.data.opened import kind_of, read_text
from experiments.data.prepare import Bad, bad_row, in_parts, shares_of
from experiments.data.rows import ROWS, Row, rows_of
from experiments.data.sources import Source
from experiments.data.store import NONE, Samples, Writer
from experiments.data.tokens import begin_and_end, tokenize_document
from experiments.data.windows import Document, Tokens, Window, tokens_of, windows, without_tokens
from experiments.errors import UserError
from experiments.system.progress import Count
from experiments.system.workers import in_order


def text_blocks(
    sources: list[Source], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, writer: Writer, processes: int
) -> Made:
    """Training and held-out blocks. The last share of each source is held out, unless there is a file of its own; the
    validation part is the share before it.

    Raises:
        UserError: a file cannot be read or is too short; a row has no text, unless those are to be skipped.
    """
    begin, _ = begin_and_end(tokenizer)
    if cfg.max_length <= len(begin):
        raise UserError(
            f"data.max_length={cfg.max_length}: the tokenizer begins a text by {len(begin)} tokens: raise it"
        )
    bad = Bad()
    parts: dict[str, list[ndarray]] = {"train": [], "heldout": []}  # of each source
    with Count("tokenizing", "parts") as progress:
        for source in sources:
            ids = _tokens(source, cfg, tokenizer, bad, progress, processes)
            cut = 0 if source.heldout else len(ids)
            if not any(other.heldout for other in sources):
                share = round(cfg.heldout_fraction * len(ids))
                if cfg.part == "validation" and not cfg.heldout_path:
                    ids = ids[: len(ids) - share]
                cut = len(ids) - share
            parts["train"].append(ids[:cut])
            parts["heldout"].append(ids[cut:])
    train, heldout = (sum(map(len, found)) for found in parts.values())
    if min(train, heldout) < 2:  # one token has no next token to predict
        raise UserError(
            f"{sources[0].name}: {train} training and {heldout} held-out tokens are too few: "
            "add text or set data.heldout_path=FILE"
        )
    limits = {"train": cfg.max_train, "heldout": cfg.max_heldout}
    places, counts, written = {}, [], 0
    for name, found in parts.items():
        first, left = written, limits[name]
        for number, ids in enumerate(found):
            blocks = _blocks(ids, cfg.max_length, numpy.array(begin, "int32"), number, left)
            writer.add(blocks)
            written += len(blocks.lengths)
            left = None if left is None else left - len(blocks.lengths)
            counts += [len(blocks.lengths)] if name == "train" and not sources[number].heldout else []
        places[name] = numpy.arange(first, written)
    shares = shares_of(counts, sources) if sources[0].weight else None
    n, m = (len(found) for found in places.values())
    note = f"{cfg.name}: {n} training and {m} held-out blocks of at most {cfg.max_length} tokens"
    return writer.samples(), places, shares, note + (f"; {bad}" if bad.count else "")


def _tokens(
    source: Source, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, bad: Bad, progress: Count, processes: int
) -> ndarray:
    """The tokens of all documents of a source."""
    work = functools.partial(_tokenize, tokenizer=tokenizer, skip=cfg.bad == "skip")
    found, document = [numpy.empty(0, "int32")], Document(tokenizer)
    for tokens in in_order(work, _parts(source, tokenizer), processes):
        progress.advance(1)
        if isinstance(tokens, Tokens):
            document.add(tokens)
            if tokens.end is not None:
                continue
            tokens = document.ids(), [document.bad] * (document.bad is not None)
            document = Document(tokenizer)
        found.append(tokens[0])
        bad.add(tokens[1])
    return numpy.concatenate(found)


def _parts(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Row] | Window]:
    """Rows, and windows of files of text, whose tokens a process makes at a time."""
    for file in source.files:
        if kind_of(file) in ROWS:
            yield from in_parts(rows_of(file))
        elif tokenizer.is_fast:
            yield from windows(file)
        else:  # it does not say where a token begins
            yield [Row(file, read_text(file))]


def _tokenize(
    part: list[Row] | Window, tokenizer: PreTrainedTokenizerBase, skip: bool
) -> Tokens | tuple[ndarray, list[str]]:
    if isinstance(part, Window):
        try:
            return tokens_of(part, tokenizer)
        except ValueError as error:
            return without_tokens(part, bad_row(part, error, skip))
    ids, bad = [], []
    for row in part:
        try:
            ids += tokenize_document(tokenizer, _text(row.read()))
        except ValueError as error:
            bad.append(bad_row(row, error, skip))
    return numpy.array(ids, "int32"), bad


def _text(value: object) -> str:
    """The text of a row, or that of a file."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object with a text, not {kind(value)}")
    if value.get("text") is None:
        keys = ", ".join(map(repr, value)) or "none"
        raise ValueError(f"text is missing among the keys {keys}: for conversations use data=jsonl")
    return read_text_of(value, "text")


def _blocks(ids: ndarray, length: int, begin: ndarray, source: int, limit: int | None) -> Samples:
    """The tokens in blocks, of which the last may be shorter; one token alone is left out."""
    step = length - len(begin)
    starts = range(0, len(ids), step)[:limit]
    blocks = [numpy.concatenate([begin, ids[start : start + step]]) for start in starts]
    blocks = [block for block in blocks if len(block) > 1]
    none = numpy.zeros(len(blocks), "int64")
    tokens = numpy.concatenate(blocks) if blocks else numpy.empty(0, "int32")
    return Samples(
        tokens, numpy.ones(len(tokens), bool), numpy.empty(0, "uint8"), numpy.array(list(map(len, blocks)), "int64"),
        none, none + NONE, (none + NONE).astype("int8"), none + source,
    )  # fmt: skip
