"""Ways to damage a file, each a function of its bytes, those of the same file elsewhere, and a random generator."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

OTHERS = (None, True, -1, 0, 2**63, 1e308, "", "x", "../../x", [], [[]], {}, {"x": None})  # values of other types


def truncated(whole: bytes, other: bytes, rng: Random) -> bytes:
    return whole[: rng.randrange(len(whole))]


def flipped(whole: bytes, other: bytes, rng: Random) -> bytes:
    damaged = bytearray(whole)
    for _ in range(rng.choice((1, 1, 3))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def zeroed(whole: bytes, other: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(whole))
    length = min(rng.choice((1, 16, 512, 4096)), len(whole) - start)
    return whole[:start] + bytes(length) + whole[start + length :]


def longer(whole: bytes, other: bytes, rng: Random) -> bytes:
    return whole + rng.choice((b"\0" * 16, b"}", b"x: 1\n", whole))


def swapped(whole: bytes, other: bytes, rng: Random) -> bytes:
    return other


def empty(whole: bytes, other: bytes, rng: Random) -> bytes:
    return b""


def retyped(whole: bytes, other: bytes, rng: Random) -> bytes:
    """JSON with one value of another type, or without one."""
    before, after = b"", b""
    if whole.startswith((b"#", b'{"step"')):  # a value in one of the lines
        lines = whole.splitlines(keepends=True)
        at = rng.randrange(whole.startswith(b"#"), len(lines))
        before, whole, after = b"".join(lines[:at]), lines[at], b"".join(lines[at + 1 :])
    tree = json.loads(whole)
    holder, key = rng.choice(list(_places(tree)))
    if rng.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = rng.choice(OTHERS)
    return before + json.dumps(tree).encode() + b"\n" + after


def _places(tree: Any) -> Any:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


WAYS: tuple[Callable[[bytes, bytes, Random], bytes], ...] = (truncated, flipped, zeroed, longer, swapped, empty)
