"""Files of users as bytes and as text, gzipped or not, in UTF-8 or in what their byte order mark says."""

import codecs
import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import UserError

AT_ONCE = 2**20  # bytes that are read
UNZIPPED, UNZIPPED_TIMES = 2**28, 200  # bytes of a gzip file that are read in any case; beyond, times its size
ENCODINGS = {  # by the marks that files begin with; the longer ones first
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def kind_of(path: str) -> str:
    """The ending that says how to read a file, `.gz` left out."""
    return Path(path.removesuffix(".gz")).suffix.lower()


def opened(path: str) -> io.BufferedIOBase:
    """The bytes of a file, unzipped."""
    expanded = os.path.expanduser(path)
    if not path.endswith(".gz"):
        return open(expanded, "rb")
    return io.BufferedReader(_Unzipped(gzip.open(expanded), os.path.getsize(expanded)), AT_ONCE)


def encoding_of(file: io.BufferedIOBase) -> str:
    """The encoding by the mark that a file begins with, behind which the file is afterwards."""
    data = file.read(4)
    mark = next((mark for mark in ENCODINGS if data.startswith(mark)), b"")
    file.seek(len(mark))
    return ENCODINGS.get(mark, "utf-8")


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Inside, a file that cannot be read is a UserError, whose message begins with the file's name."""
    try:
        yield
    except OSError as error:
        told = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot read this file: {told}") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error


def zero_byte(encoding: str) -> str:
    return f"a zero byte, so this is not text in {encoding.upper()}: save the file as UTF-8"


def pieces(path: str) -> Iterator[str]:
    """The text of a file, one piece after the other.

    Raises:
        UserError: no such file, an empty one, or bytes that are not text.
    """
    with reading(path), opened(path) as file:
        encoding = encoding_of(file)
        decoder, read, line, is_blank = codecs.getincrementaldecoder(encoding)(), file.tell(), 1, True
        while True:
            data = file.read(AT_ONCE)
            read += len(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                line += before.decode(encoding, errors="replace").count("\n")
                at = read - len(error.object) + error.start
                raise UserError(
                    f"{path}:{line}: not {encoding.upper()} at byte {at}: save the file as UTF-8"
                ) from error
            if "\0" in text:
                line += text[: text.index("\0")].count("\n")
                raise UserError(f"{path}:{line}: {zero_byte(encoding)}")
            line += text.count("\n")
            is_blank = is_blank and not text.strip()
            if text:
                yield text
            if not data:
                break
        if is_blank:
            raise UserError(f"{path}: the file is empty")


def read_text(path: str) -> str:
    """All of it. Raises UserError as `pieces`."""
    return "".join(pieces(path))


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
