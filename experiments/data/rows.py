"""The rows of users' files, each with its place: JSON Lines, JSON arrays, CSV, Parquet and Arrow; plain text.

Files of text may be gzipped. They are read row by row; a JSON array alone is in memory as a whole.
"""

import codecs
import csv
import functools
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.errors import UserError

LINES, TABLES, ARROW = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".parquet", ".arrow")
ROWS = LINES + TABLES + ARROW
PLAIN = (".txt", ".md")
UNZIPPED, UNZIPPED_TIMES = 2**28, 200  # bytes of a gzip file that are read in any case; beyond, times its size
ROWS_AT_ONCE = 1000  # of a Parquet or Arrow file
ENCODINGS = {  # by the marks that files begin with; the longer ones first
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True)
class Row:
    """A row as it is in the file.

    Attributes:
        where: FILE:LINE, or FILE, row N.
        value: a line of JSON Lines, which nobody has decoded yet, or a value.
    """

    where: str
    value: Any

    def read(self) -> Any:
        """The value. Raises ValueError with the reason if the line is not JSON."""
        if not isinstance(self.value, bytes):
            return self.value
        try:
            return _decoder().decode(_line(self.value))
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise ValueError("lists or objects in one another, deeper than JSON is read") from error


def kind_of(path: str) -> str:
    """The ending that says how to read a file, `.gz` left out."""
    return Path(path.removesuffix(".gz")).suffix.lower()


def rows_of(path: str) -> Iterator[Row]:
    """The rows of one file; empty lines are left out.

    Raises:
        UserError: it cannot be read; the message begins with the file's name.
    """
    read = {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv, ".tsv": _csv}.get(kind_of(path), _json)
    empty = True
    try:
        for row in read(path):
            empty = False
            yield row
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error
    if empty:
        raise UserError(f"{path}: no rows in this file")


def read_text(path: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        UserError: no such file, an empty one, or bytes that are not text.
    """
    try:
        with _opened(path) as file:
            data = file.read()
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error
    mark, encoding = _mark(data)
    data = data.removeprefix(mark)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="replace").count("\n") + 1
        at = len(mark) + error.start
        raise UserError(f"{path}:{line}: not {encoding.upper()} at byte {at}: save the file as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{path}:{line}: {_zero_byte(encoding)}")
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def _opened(path: str) -> io.BufferedIOBase:
    expanded = os.path.expanduser(path)
    if not path.endswith(".gz"):
        return open(expanded, "rb")
    return io.BufferedReader(_Unzipped(gzip.open(expanded), os.path.getsize(expanded)), 2**20)


class _Unzipped(io.RawIOBase):
    """The content of a gzip file, as long as it is not one that was made to fill the memory: text is seldom a tenth of
    its size when it is compressed, zeros a thousandth.

    Args:
        size: of the compressed file.
    """

    def __init__(self, file: gzip.GzipFile, size: int):
        self.file, self.most = file, max(UNZIPPED, UNZIPPED_TIMES * size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        count = self.file.readinto(buffer)
        if self.file.tell() > self.most:
            raise OSError(f"more than {UNZIPPED_TIMES} times as large when unzipped: unzip it first, if that is right")
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def _unreadable(path: str, error: OSError) -> str:
    return f"{path}: cannot read this file: {error.strerror or _first_line(error)}"


def _mark(data: bytes) -> tuple[bytes, str]:
    mark = next((mark for mark in ENCODINGS if data.startswith(mark)), b"")
    return mark, ENCODINGS.get(mark, "utf-8")


def _zero_byte(encoding: str) -> str:
    return f"a zero byte, so this is not text in {encoding.upper()}: save the file as UTF-8"


def _line(line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from error
    if "\0" in text:
        raise ValueError(_zero_byte("utf-8"))
    return text


def _json(path: str) -> Iterator[Row]:
    """The rows of a file of JSON Lines, or the elements of one JSON array."""
    with _opened(path) as file:
        mark, encoding = _mark(file.read(4))
        file.seek(len(mark))
        first = b""
        if encoding == "utf-8":
            first = next((line.lstrip() for line in file if line.strip()), b"")
        if encoding == "utf-8" and first[:1] != b"[":
            file.seek(len(mark))
            empty = True
            for number, line in enumerate(file, start=1):
                if line.strip():
                    empty = False
                    yield Row(f"{path}:{number}", line)
            if empty:
                raise UserError(f"{path}: the file is empty")
            return
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from _elements(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # JSON text may hold other line separators
        if line.strip():
            yield Row(f"{path}:{number}", line.encode("utf-8"))


def _elements(path: str, text: str) -> Iterator[Row]:
    """The elements of one JSON array, each with its line."""
    decoder, at, line, counted = _decoder(), text.index("[") + 1, 1, 0
    try:
        while True:
            at = _behind_blanks(text, at)
            if text[at : at + 1] == "]":
                break
            line, counted = line + text.count("\n", counted, at), at
            value, at = decoder.raw_decode(text, at)
            yield Row(f"{path}:{line}", value)
            at = _behind_blanks(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at += text[at] == ","
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, _behind_blanks(text, at + 1))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise UserError(f"{path}:{line}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}:{line}: lists or objects in one another, deeper than JSON is read") from error


def _behind_blanks(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"not JSON: {name} is not a value in JSON: write null")


def _csv(path: str) -> Iterator[Row]:
    """The rows below a line of titles; a cell with nothing in it is not there."""
    with _opened(path) as file:
        mark, encoding = _mark(file.read(4))
        file.seek(len(mark))
        text = io.TextIOWrapper(file, encoding, newline="")
        reader = csv.reader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
        try:
            titles, before = next(reader, []), reader.line_num
            for cells in reader:
                where, before = f"{path}:{before + 1}", reader.line_num
                if len(cells) > len(titles):
                    raise UserError(f"{where}: {len(cells)} cells under {len(titles)} titles: quote cells with commas")
                if cells:
                    yield Row(where, {title: cell for title, cell in zip(titles, cells) if cell})
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from error
        except UnicodeDecodeError as error:
            where = f"{path}:{reader.line_num + 1}"
            raise UserError(f"{where}: not {encoding.upper()} here or below: save the file as UTF-8") from error


def _pyarrow(path: str) -> ModuleType:
    try:
        import pyarrow  # here, because most users have no such file
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading this file takes pyarrow: pip install pyarrow") from error
    return pyarrow


def _parquet(path: str) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    with _opened(path) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE)
            yield from _arrow_rows(path, batches)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a whole Parquet file: {_first_line(error)}") from error


def _arrow(path: str) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    with _opened(path) as file:
        try:
            if file.read(6) == b"ARROW1":  # a file with an index; `datasets` writes streams
                table = pyarrow.ipc.open_file(file)
                yield from _arrow_rows(path, (table.get_batch(i) for i in range(table.num_record_batches)))
            else:
                file.seek(0)
                yield from _arrow_rows(path, pyarrow.ipc.open_stream(file))
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a whole Arrow file: {_first_line(error)}") from error


def _arrow_rows(path: str, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield Row(f"{path}, row {number}", _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """The value without the keys that are null: Arrow gives each object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
