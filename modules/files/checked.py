"""Checksums of what the project writes: a bit that flipped on a disk is found when a file is read.

A safetensors file has them in its metadata, where others do not look:

    checksums       JSON {tensor's name: 16 hexadecimal digits}, XXH3-64 of its name, dtype, shape and bytes
    checksums_of    how many tensors there are: with one of the two entries damaged, the other one tells

The other files of a directory have them in checksums.json: {file's name: XXH3-64 of its bytes}. Whoever changes such a
file on purpose deletes checksums.json. Files without checksums come from elsewhere and are read as they are.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ENTRY, COUNT, SUMS = "checksums", "checksums_of", "checksums.json"
_LENGTH = 8  # bytes before the header, which give its length


class Damaged(ValueError):
    """A file is not the one that was written, or cannot be read. The message names it."""


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with checksums."""
    entries = {"format": "pt"} | _entries(tensors)
    save_file(tensors, path, metadata=entries)
    _write_metadata(path, entries)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, compared with its checksums if it has them.

    Raises:
        Damaged: the file cannot be read, or is damaged.
    """
    verify(path)
    return load_file(path)


def verify(path: Path) -> None:
    """Compare a safetensors file with its checksums, if it has them.

    Raises:
        Damaged: the file cannot be read, or is damaged; the message names the file and the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            if not entries.keys() & {ENTRY, COUNT}:
                return
            names = file.keys()
            if entries != entries | _entries({name: file.get_tensor(name) for name in names}):
                raise Damaged(f"{path} is damaged: {_difference(entries, file)}")
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path} is damaged or not a safetensors file: {error}") from error


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
    for path in sorted(directory.glob("*.safetensors")):
        verify(path)
    for name in _sums(directory):
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
    seal_files(directory, [path.name for path in directory.iterdir() if path.suffix != ".safetensors"])


def seal_files(directory: Path, names: Iterable[str]) -> None:
    """Write checksums.json for these files of a directory."""
    files = [directory / name for name in sorted(names) if name != SUMS and (directory / name).is_file()]
    partial = directory / f".{SUMS}.partial"
    partial.write_text(json.dumps({path.name: _checksum_of(path) for path in files}, indent=2) + "\n")
    partial.replace(directory / SUMS)


def _sums(directory: Path) -> dict[str, str]:
    path = directory / SUMS
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path} is damaged: it holds no names of files")
    return found


def _checksum_of(path: Path) -> str:
    return xxhash.xxh3_64(path.read_bytes()).hexdigest()


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
