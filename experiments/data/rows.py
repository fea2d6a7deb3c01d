"""The rows of users' files, each with its place: JSON Lines, JSON arrays, CSV, Parquet and Arrow.

Files of text may be gzipped. All are read row by row, and few rows are in memory at a time.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from experiments.data.json_rows import lines_or_elements, value_of
from experiments.data.opened import encoding_of, kind_of, opened, reading
from experiments.errors import UserError

LINES, TABLES, ARROW = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".parquet", ".arrow")
ROWS = LINES + TABLES + ARROW
PLAIN = (".txt", ".md")
ROWS_AT_ONCE = 1000  # of a Parquet or Arrow file


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
        return value_of(self.value) if isinstance(self.value, bytes) else self.value


def rows_of(path: str) -> Iterator[Row]:
    """The rows of one file; empty lines are left out.

    Raises:
        UserError: it cannot be read; the message begins with the file's name.
    """
    read = {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv, ".tsv": _csv}.get(kind_of(path), _json)
    empty = True
    with reading(path):
        for row in read(path):
            empty = False
            yield row
    if empty:
        raise UserError(f"{path}: no rows in this file")


def _json(path: str) -> Iterator[Row]:
    for number, value in lines_or_elements(path):
        yield Row(f"{path}:{number}", value)


def _csv(path: str) -> Iterator[Row]:
    """The rows below a line of titles; a cell with nothing in it is not there."""
    with opened(path) as file:
        encoding = encoding_of(file)
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
    with opened(path) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE)
            yield from _arrow_rows(path, batches)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a whole Parquet file: {_first_line(error)}") from error


def _arrow(path: str) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    with opened(path) as file:
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
