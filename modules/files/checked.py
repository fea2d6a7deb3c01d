"""Checksums of what the project writes: a bit that flipped on a disk is found when a file is read.

A safetensors file has them in its metadata, where others do not look:

    checksums       JSON {tensor's name: 16 hexadecimal digits}, XXH3-64 of its name, dtype, shape and bytes
    checksums_of    how many tensors there are: with one of the two entries damaged, the other one tells

A directory has them in checksums.json: {file's name: XXH3-64 of its bytes}; of a safetensors file those of its header,
which has the others. So a whole file of another directory is noticed too. Whoever changes such a file on purpose
deletes checksums.json. A single text file has its checksum in a comment on top. Files without checksums come from
elsewhere and are read as they are.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ENTRY, COUNT, SUMS = "checksums", "checksums_of", "checksums.json"
BASE = "base"  # a fingerprint in the same place
_TOP = "# checksum "  # of the first line of a single text file
_LENGTH = 8  # bytes before the header, which give its length


class Damaged(ValueError):
    """A file is not the one that was written, or cannot be read. The message names it."""


def save_tensors(tensors: dict[str, Tensor], path: Path, base: dict[str, str] | None = None) -> None:
    """Write a safetensors file with checksums.

    Args:
        base: the fingerprint of the base model that they belong to (modules/adapters/base_print.py).
    """
    entries = {"format": "pt"} | _entries(tensors) | ({BASE: json.dumps(base)} if base else {})
    save_file(tensors, path, metadata=entries)
    _write_metadata(path, entries)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, compared with its checksums if it has them.

    Raises:
        Damaged: the file cannot be read, or is damaged.
    """
    verify(path)
    return load_file(path)


def base_of(path: Path) -> dict[str, str]:
    """The fingerprint of the base model in a safetensors file; empty: it has none."""
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get(BASE, "{}")
    try:
        return dict(json.loads(written))
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: its fingerprint of the base cannot be read") from error


def verify(path: Path) -> None:
    """Compare a safetensors file with its checksums, and with the checksums.json beside it, if there are such.

    Raises:
        Damaged: the file cannot be read, or is damaged; the message names the file and the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries, names = file.metadata() or {}, file.keys()
            if entries.keys() & {ENTRY, COUNT} and entries != entries | _entries(
                {name: file.get_tensor(name) for name in names}
            ):
                raise Damaged(f"{path} is damaged: {_difference(entries, file)}")
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path} is damaged or not a safetensors file: {error}") from error
    verify_file(path)


def verify_file(path: Path) -> None:
    """Compare a file with the checksums.json beside it, if that has it.

    Raises:
        Damaged: the file is missing, or another than was written.
    """
    written = _sums(path.parent).get(path.name)
    if written is not None and (not path.is_file() or _checksum_of(path) != written):
        raise Damaged(
            f"{path} is damaged, or was changed after it was written: if on purpose, delete {path.parent / SUMS}"
        )


def verify_directory(directory: Path) -> None:
    """Compare all files of a directory with their checksums, as far as they have some.

    Raises:
        Damaged: a file is missing or damaged; the message names it.
    """
    tensors = sorted(directory.glob("*.safetensors"))
    for path in tensors:
        verify(path)
    for name in _sums(directory).keys() - {path.name for path in tensors}:
        verify_file(directory / name)


def seal_directory(directory: Path) -> None:
    """Give the files of a directory checksums, those in its folders left out."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names, entries = file.keys(), file.metadata() or {}
            if ENTRY in entries:
                continue
            entries |= _entries({name: file.get_tensor(name) for name in names})
        _write_metadata(path, entries)
    seal_files(directory, [path.name for path in directory.iterdir()])


def seal_files(directory: Path, names: Iterable[str]) -> None:
    """Write checksums.json for these files of a directory."""
    files = [directory / name for name in sorted(names) if name != SUMS and (directory / name).is_file()]
    partial = directory / f".{SUMS}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({path.name: _checksum_of(path) for path in files}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())  # or after a loss of power the name might stand for nothing
    partial.replace(directory / SUMS)


def with_checksum(text: str) -> str:
    """`text` below a comment with its checksum."""
    return f"{_TOP}{checksum_of(text)}: delete this line after a change by hand\n{text}"


def read_checked(path: Path) -> str:
    """The text of a file without the comment that `with_checksum` gave it, with which it is compared.

    Raises:
        Damaged: it is another text.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    if not text.startswith(_TOP):
        return text
    first, _, rest = text.partition("\n")
    if not re.match(f"{_TOP}{checksum_of(rest)}: ", first):
        raise Damaged(f"{path} is damaged, or was changed after it was written: if on purpose, delete its first line")
    return rest


def checksum_of(text: str) -> str:
    """16 hexadecimal digits of a text."""
    return xxhash.xxh3_64(text.encode()).hexdigest()


def _sums(directory: Path) -> dict[str, str]:
    path = directory / SUMS
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path} is damaged: it holds no names of files")
    return found


def _checksum_of(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            length = file.read(_LENGTH)
            digest.update(length + file.read(int.from_bytes(length, "little")))
        else:
            while part := file.read(2**24):
                digest.update(part)
    return digest.hexdigest()


def _write_metadata(path: Path, entries: dict[str, str]) -> None:
    """Write the metadata of a safetensors file, in the order of their names. The library's own order is random."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length)) | {"__metadata__": dict(sorted(entries.items()))}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(_LENGTH)
            file.write(text.ljust(length))
            return
        text = text.ljust(-(-len(text) // _LENGTH) * _LENGTH)  # data begin at a multiple of 8 bytes
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as new:
            new.write(len(text).to_bytes(_LENGTH, "little") + text)
            shutil.copyfileobj(file, new, 2**24)
    partial.replace(path)


def _entries(tensors: dict[str, Tensor]) -> dict[str, str]:
    found = {name: checksum(name, tensor) for name, tensor in sorted(tensors.items())}
    return {ENTRY: json.dumps(found), COUNT: str(len(found))}


def checksum(name: str, tensor: Tensor) -> str:
    """16 hexadecimal digits of a tensor."""
    digest = xxhash.xxh3_64(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _difference(entries: dict[str, str], file: safe_open) -> str:
    """The first tensor that is not the one that was written."""
    try:
        written = dict(json.loads(entries[ENTRY]))
    except (KeyError, ValueError, TypeError):
        return "its checksums cannot be read"
    names = file.keys()
    for name in sorted({*names, *written}):
        if name not in written or name not in names or checksum(name, file.get_tensor(name)) != written[name]:
            return f"{name} is not the tensor that was written"
    return "its number of checksums is wrong"
