"""The tensors of a model directory: model.safetensors, or the shards that model.safetensors.index.json names."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from modules.files.checked import verify

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a directory by name. Each is read from its memory-mapped file on demand.

    Raises:
        ValueError: a file is missing or damaged, or does not hold the tensors that the index lists.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._where: dict[str, tuple[Path, Callable[[], Tensor]]] = {}  # its file, and how to get it
        self._read: set[str] = set()
        single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
        if single.is_file():
            self._open(single)
        elif index.is_file():
            try:
                shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                shards = sorted({str(shard) for shard in shard_of.values()})
                if elsewhere := [shard for shard in shards if Path(shard).name != shard]:
                    raise ValueError(f"it names {elsewhere[0]}, a file of another directory")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ValueError(f"{index} is not an index of shards: {error!r}") from error
            for shard in shards:
                if not (directory / shard).is_file():
                    raise ValueError(f"{directory / shard} is missing: {INDEX_FILE} names it")
                self._open(directory / shard)
            for name, shard in shard_of.items():
                if name not in self or self.path(name).name != shard:
                    raise ValueError(f"{directory / shard}: {name} is missing: {INDEX_FILE} places it there")
        else:
            raise ValueError(f"{directory}: no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")

    def _open(self, path: Path) -> None:
        verify(path)
        file = safe_open(path, framework="pt")
        names = file.keys()
        self._where |= {name: (path, partial(file.get_tensor, name)) for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def path(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._where[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def rename(self, names: dict[str, str]) -> None:
        """Give tensors other names."""
        self._where = {names.get(name, name): there for name, there in self._where.items()}

    def replace(self, names: list[str], tensors: dict[str, Tensor]) -> None:
        """Have `tensors` in place of the tensors `names`, of which they are made."""
        path = self.path(names[0])
        for name in names:
            del self._where[name]
        self._where |= {name: (path, partial(tensor.view, tensor.shape)) for name, tensor in tensors.items()}

    def unread(self) -> set[str]:
        """The names of the tensors that `read` has not returned yet."""
        return self._where.keys() - self._read

    def tensor(self, name: str) -> Tensor:
        """The tensor in the memory of its file, not copied.

        Raises:
            ValueError: the tensor is missing.
        """
        if name not in self:
            raise ValueError(f"{self.directory}: {name} is missing")
        return self._where[name][1]()

    def read(self, name: str, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """A copy of the tensor. In the file it may lack the alignment that kernels need.

        Args:
            dtype, shape: the required dtype and shape; None: any.

        Raises:
            ValueError: the tensor is missing, or has another dtype or shape.
        """
        tensor = self.tensor(name)
        dtype, shape = dtype or tensor.dtype, tensor.shape if shape is None else torch.Size(shape)
        if tensor.dtype != dtype or tensor.shape != shape:
            found, needed = describe(tensor.dtype, tensor.shape), describe(dtype, shape)
            raise ValueError(f"{self.path(name)}: {name} is {found}; the model needs {needed}")
        self._read.add(name)
        return tensor.clone()


def describe(dtype: torch.dtype, shape: torch.Size) -> str:
    """A tensor in messages: `float32 [96, 64]`."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
