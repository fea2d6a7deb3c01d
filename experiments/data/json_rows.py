"""Rows of JSON: lines, or the elements of one array, of which a part is in memory at a time."""

import codecs
import functools
import json
from collections.abc import Iterator
from typing import Any

from experiments.data.opened import AT_ONCE, encoding_of, opened, pieces, zero_byte
from experiments.errors import UserError

TOO_DEEP = "lists or objects in one another, deeper than JSON is read"
LONGEST_WORD = len("-Infinity")


def value_of(line: bytes) -> Any:
    """The value of a line. Raises ValueError with the reason if it is not JSON."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from error
    if "\0" in text:
        raise ValueError(zero_byte("utf-8"))
    try:
        return _decoder().decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error


def lines_or_elements(path: str) -> Iterator[tuple[int, Any]]:
    """The lines of a file, which nobody has decoded yet, or the elements of its array; each with the number of its
    line."""
    with opened(path) as file:
        encoding = encoding_of(file)
        decoder, first = codecs.getincrementaldecoder(encoding)("replace"), ""
        while not first and (data := file.read(AT_ONCE)):
            first = decoder.decode(data).lstrip()[:1]
    if not first:
        raise UserError(f"{path}: the file is empty")
    if first == "[":
        yield from _elements(path)
        return
    for number, line in enumerate(_utf_8_lines(path) if encoding == "utf-8" else _lines(path), start=1):
        if line.strip():
            yield number, line


def _utf_8_lines(path: str) -> Iterator[bytes]:
    with opened(path) as file:
        encoding_of(file)
        yield from file


def _lines(path: str) -> Iterator[bytes]:
    """The lines of a file in another encoding. JSON text may hold other line separators than \n."""
    rest = ""
    for text in pieces(path):
        *whole, rest = (rest + text).split("\n")
        yield from (line.encode() for line in whole)
    yield rest.encode()


class _Text:
    """The part of a text that is being read.

    Attributes:
        text, at: the part, and the place in it.
        done: nothing follows it.
        line, column: both from 1, of the place that was `told` last.
    """

    def __init__(self, parts: Iterator[str]):
        self.parts, self.text, self.at, self.done = parts, "", 0, False
        self.line, self.column, self.told = 1, 1, 0

    def tell(self, at: int) -> None:
        """Find the line and the column of a place, which lies behind those before."""
        between = self.text[self.told : at]
        self.line += between.count("\n")
        self.column = len(between) - between.rfind("\n") if "\n" in between else self.column + len(between)
        self.told = at

    def more(self) -> None:
        """Leave out what is read, and add as much as is there."""
        self.tell(self.at)
        found = [self.text[self.at :]]
        wanted = max(1, len(found[0]))
        self.at = self.told = 0
        while wanted > 0 and not self.done:
            part = next(self.parts, None)
            self.done = part is None
            found.append(part or "")
            wanted -= len(found[-1])
        self.text = "".join(found)

    def next(self) -> str:
        """The next character that is not blank; it stays the next one. Nothing at the end."""
        while True:
            while self.text[self.at : self.at + 1].isspace():
                self.at += 1
            if self.at < len(self.text) or self.done:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = _decoder().raw_decode(self.text, self.at)
                if end + len("e-") < len(self.text) or self.done:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 2 * LONGEST_WORD
                if self.done or not goes_on:
                    raise
            self.more()


def _elements(path: str) -> Iterator[tuple[int, Any]]:
    text = _Text(pieces(path))
    try:
        text.next()
        text.at += 1
        while text.next() != "]":
            text.tell(text.at)
            line = text.line
            yield line, text.value()
            if text.next() not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text.text, text.at)
            text.at += text.next() == ","
        text.at += 1
        if text.next():
            raise json.JSONDecodeError("Extra data", text.text, text.at)
    except json.JSONDecodeError as error:
        text.tell(error.pos)
        raise UserError(f"{path}:{text.line}: not JSON: {error.msg} at column {text.column}") from error
    except ValueError as error:
        raise UserError(f"{path}:{line}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}:{line}: {TOO_DEEP}") from error


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"not JSON: {name} is not a value in JSON: write null")
