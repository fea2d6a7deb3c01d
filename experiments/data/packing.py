"""Packing: samples laid end to end in one row, so that hardly a token of a forward pass is padding.

A pack is the list of samples of one row. Positions start again at each sample, and attention stays inside it: models of
transformers read that from the positions. The order of an epoch is a pure function of the seed and the epoch's number,
as it is without packing (samples.py).
"""

import itertools
import random
from bisect import insort
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from experiments.data.chat import IGNORED, Example
from experiments.data.samples import served_places
from experiments.data.store import Batches, lengths_of
from experiments.errors import UserError

OPEN_PACKS = 64  # that a sample may still join: more means less padding


def check_lengths(examples: Sequence[Example], tokens: int) -> None:
    """Raise UserError if a sample fits no pack."""
    longest = max(lengths_of(examples))
    if longest > tokens:
        raise UserError(
            f"data.packing: a sample has {longest} tokens and a pack trainer.tokens={tokens}: "
            f"set trainer.tokens={longest} or more, or data.max_length={tokens} with data.too_long=drop or truncate"
        )


def epoch_packs(examples: Sequence[Example], tokens: int, seed: int, epoch: int) -> Batches:
    """One epoch's packs, at most `tokens` tokens a pack, in random order. Every example is there once; of sources with
    shares (store.py) as many as theirs.

    Examples come in random order, and each joins the fullest open pack that has room for it. (Johnson 1974, best fit,
    with a limit on the open packs.)
    """
    rng = random.Random(f"{seed}, {epoch}")
    packs: list[list[int]] = []  # the places of their examples
    room: list[tuple[int, int]] = []  # (tokens left, the pack's number) of the open packs, the fullest first
    served, lengths = served_places(examples, seed, epoch), lengths_of(examples)
    for place in rng.sample(served, len(served)):
        length = lengths[place]
        fullest = next((i for i, (left, _) in enumerate(room) if left >= length), None)
        if fullest is None:
            left, number = tokens, len(packs)
            packs.append([])
            if len(room) == OPEN_PACKS:
                del room[0]
        else:
            left, number = room.pop(fullest)
        packs[number].append(place)
        insort(room, (left - length, number))
    rng.shuffle(packs)
    return Batches(examples, packs)


def packs(examples: Sequence[Example], tokens: int, seed: int, start: int = 0) -> Iterator[list[Example]]:
    """Training packs without end, epoch after epoch (see `epoch_packs`), but for the first `start`."""
    for epoch in itertools.count():
        found = epoch_packs(examples, tokens, seed, epoch)
        yield from found[start:]
        start = max(0, start - len(found))


def share(pack: list[Example], rank: int, size: int) -> list[Example]:
    """The samples of one process: all have about as many tokens. Perhaps none."""
    shares: list[list[Example]] = [[] for _ in range(size)]
    loads = [0] * size
    for example in sorted(pack, key=lambda example: -len(example.input_ids)):
        least = loads.index(min(loads))
        shares[least].append(example)
        loads[least] += len(example.input_ids)
    return shares[rank]


def collate_pack(pack: list[Example], tokens: int, pad_id: int) -> dict[str, Tensor]:
    """A pack as int64 tensors with one row of `tokens` columns, padded on the right.

    Returns:
        input_ids [1, tokens]; position_ids [1, tokens], from 0 in each sample and in the padding, which so is a sample
        of its own; labels [1, tokens], IGNORED in the padding and at the first token of a sample, which no token
        predicts.
    """
    ids, positions, labels = [], [], []
    for example in pack:
        ids += example.input_ids
        positions += range(len(example.input_ids))
        labels += [IGNORED, *example.labels[1:]]
    padding = tokens - len(ids)
    ids += [pad_id] * padding
    positions += range(padding)
    labels += [IGNORED] * padding
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([values]) for name, values in columns.items()}
