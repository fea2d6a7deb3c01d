"""The header of a GGUF file, looked through before libraries believe its numbers.

They take memory and time for as many keys, strings and weights as it says. Here each count is held against the file's
size, and each size of the model against the tensors'.
"""

import math
import mmap
import struct
from pathlib import Path

from experiments.errors import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS, VALUES_A_BYTE = 8, 8  # of a tensor; the smallest types take more than a bit a value
LAYERS = "block_count"
SIZES = ("embedding_length", "feed_forward_length", "vocab_size", "head_count", "key_length", "value_length")
SIZES += ("head_count_kv", "expert_count", "dimension_count")


class _Reader:
    """The values of a file, one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, kind: str) -> int | float:
        """One number. struct.error: the file ends before."""
        [value] = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def skip(self, count: int, size: int = 1) -> None:
        """Go on behind `count` values of `size` bytes. struct.error: the file ends before."""
        if count * size > len(self.data) - self.at:
            raise struct.error(f"{count} values at byte {self.at}")
        self.at += count * size

    def string(self) -> bytes:
        length = self.take("Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at]

    def value(self, kind: int, depth: int = 0) -> int | float | None:
        """A number; strings and arrays are passed by."""
        if kind in SCALARS:
            return self.take(SCALARS[kind])
        if kind == STRING:
            self.string()
        elif kind == ARRAY and depth < 2:
            inner, count = self.take("I"), self.take("Q")
            if inner in SCALARS:
                self.skip(count, struct.calcsize(f"<{SCALARS[inner]}"))
            else:
                self.skip(count, 8)  # so much each takes at least
                self.at -= 8 * count
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise struct.error(f"type {kind} at byte {self.at}")
        return None


def check_header(path: Path) -> None:
    """Raise UserError if the header counts more than the file holds, or means a larger model than its tensors are."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        if reader.data[:4] != MAGIC or struct.unpack_from("<I", data, 4)[0] not in VERSIONS:
            return  # the library says what is wrong with it
        reader.skip(8)
        try:
            tensors, keys = reader.take("Q"), reader.take("Q")
            numbers = {}
            for _ in range(keys):
                key = reader.string().decode(errors="replace")
                numbers[key] = reader.value(reader.take("I"))
            sides = [_sides(reader, len(data)) for _ in range(tensors)]
        except struct.error as error:
            raise UserError(f"{path} is damaged: its header counts more than the file holds: {error}") from error
    largest = max((side for shape in sides for side in shape), default=0)
    for key, number in numbers.items():
        name = key.rpartition(".")[2]
        most = tensors if name == LAYERS else largest if name in SIZES else math.inf
        if number is not None and number > most:
            raise UserError(
                f"{path} is damaged: {key} is {number:,}, and its {tensors} tensors are not of such a model"
            )


def _sides(reader: _Reader, size: int) -> list[int]:
    """The shape of the next tensor. struct.error: the file cannot hold it."""
    reader.string()
    dimensions = reader.take("I")
    if dimensions > MOST_DIMENSIONS:
        raise struct.error(f"{dimensions} dimensions at byte {reader.at}")
    shape = [reader.take("Q") for _ in range(dimensions)]
    reader.skip(12)  # type and place
    if math.prod(shape) > VALUES_A_BYTE * size:
        raise struct.error(f"a tensor of {shape}")
    return shape
