"""A long text in windows, whose tokens several processes make: the tokens that the whole text has.

Tokens depend on the text around them, as a space belongs to the word behind it. So a window has some text of its
neighbours on both sides. Around the place where two windows meet, the tokens of both must be the same ones. Then each
is right up to there, and one ends where the other begins. Else the text is tokenized as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from experiments.data.opened import pieces, read_text
from experiments.data.tokens import end_of, tokenize, tokenize_document

SIZE, AROUND = 2**20, 2**12  # characters of a window, and on each side of it


@dataclass(frozen=True)
class Window:
    """A part of the text of a file.

    Attributes:
        where: the file.
        text: with its surroundings.
        offset: of `text` in the whole.
        begin, end: of the part in the whole; None: it ends with the whole.
    """

    where: str
    text: str
    offset: int
    begin: int
    end: int | None


@dataclass(frozen=True)
class Tokens:
    """The tokens of a window and its surroundings.

    Attributes:
        where, begin, end: of the window.
        ids, starts: int32 and int64, the tokens and where each begins in the whole text.
        bad: why it has none.
    """

    where: str
    begin: int
    end: int | None
    ids: ndarray
    starts: ndarray
    bad: str | None = None

    def within(self, begin: int, end: int | None) -> tuple[ndarray, ndarray]:
        """The tokens that begin there, and where they do."""
        part = slice(*self.starts.searchsorted([begin, self.starts.max(initial=0) + 1 if end is None else end]))
        return self.ids[part], self.starts[part]


def windows(path: str) -> Iterator[Window]:
    """The text of a file in windows. Raises UserError as `pieces`."""
    text, offset, begin = "", 0, 0
    for piece in pieces(path):
        text += piece
        while len(text) + offset >= begin + SIZE + AROUND:
            end = begin + SIZE
            yield Window(path, text[: end + AROUND - offset], offset, begin, end)
            first = max(offset, end - AROUND)
            text, offset, begin = text[first - offset :], first, end
    yield Window(path, text, offset, begin, None)


def tokens_of(window: Window, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Raises ValueError as `tokenize`."""
    encoded = tokenize(tokenizer, window.text, return_offsets_mapping=True)
    starts = numpy.array([start for start, _ in encoded["offset_mapping"]], "int64") + window.offset
    return Tokens(window.where, window.begin, window.end, numpy.array(encoded["input_ids"], "int32"), starts)


def without_tokens(window: Window, bad: str) -> Tokens:
    return Tokens(window.where, window.begin, window.end, numpy.empty(0, "int32"), numpy.empty(0, "int64"), bad)


class Document:
    """The tokens of a document, whose windows come in their order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.found: list[ndarray] = []
        self.before: Tokens | None = None
        self.bad: str | None = None
        self.fits = True

    def add(self, tokens: Tokens) -> None:
        self.bad = self.bad or tokens.bad
        if self.before is not None:
            near = tokens.begin - AROUND // 2, tokens.begin + AROUND // 2
            self.fits = self.fits and all(map(numpy.array_equal, self.before.within(*near), tokens.within(*near)))
        self.fits = self.fits and bool((numpy.diff(tokens.starts) >= 0).all())
        self.found.append(tokens.within(tokens.begin, tokens.end)[0])
        self.before = tokens

    def ids(self) -> ndarray:
        """Of the whole document, with what ends it; none if it is bad."""
        if self.bad is not None:
            return numpy.empty(0, "int32")
        if not self.fits:
            return numpy.array(tokenize_document(self.tokenizer, read_text(self.before.where)), "int32")
        return numpy.concatenate([*self.found, numpy.array(end_of(self.tokenizer), "int32")])
