"""A few shapes of batches, for steps that are recorded once for each shape (experiments/training/graphs.py).

A batch is padded on the right to the least bucket that holds it: more tokens behind each text, more places for labels
behind those that are there, and more rows. No token sees those behind it, and a place without a label weighs nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.data.chat import IGNORED, Example
from experiments.data.samples import epoch_batches

MOST = 4  # buckets: each costs a capture and memory, and saves padding
MULTIPLE = 64  # of tokens and labels: products of other sizes take as long as those of the next multiple


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of a batch: `rows` texts of `length` tokens with `labels` labelled tokens in all."""

    length: int
    labels: int
    rows: int

    def holds(self, other: "Bucket") -> bool:
        return other.length <= self.length and other.labels <= self.labels and other.rows <= self.rows


def shape(batch: list[Example]) -> Bucket:
    """The shape of a batch as it is."""
    return Bucket(max(len(one.input_ids) for one in batch), sum(map(_labels, batch)), len(batch))


def buckets(examples: list[Example], batch_size: int, seed: int) -> list[Bucket]:
    """At most `MOST` buckets, from short to long, which hold every batch of the first epoch.

    The lengths are the quartiles of the batches' lengths. Later epochs mix the samples anew: a batch with more labels
    than the first epoch's is in a longer bucket, or in none.
    """
    shapes = sorted(shape(batch) for batch in epoch_batches(examples, batch_size, seed, epoch=0))
    lengths = sorted({_up(shapes[(i * len(shapes) - 1) // MOST].length) for i in range(1, MOST + 1)})
    found = []
    for length in lengths:
        labels = max(one.labels for one in shapes if one.length <= length)
        found.append(Bucket(length, min(_up(labels), batch_size * length), batch_size))
    return found


def bucket_of(batch: list[Example], among: list[Bucket]) -> Bucket | None:
    """The least bucket that holds the batch; None if none does."""
    return next((bucket for bucket in among if bucket.holds(shape(batch))), None)


def fill(batch: list[Example], bucket: Bucket, pad_id: int) -> dict[str, Tensor]:
    """The batch, on the host, in the shape of the bucket.

    Returns:
        input_ids [rows, length]; targets [labels], the labelled tokens, then IGNORED; positions [labels], where in
        the flattened [rows · length] the hidden states are that predict them, then 0; starts [rows], the position of
        the first labelled token of each text.
    """
    input_ids = torch.full((bucket.rows, bucket.length), pad_id)
    targets, positions = torch.full((bucket.labels,), IGNORED), torch.zeros(bucket.labels, dtype=torch.int64)
    starts, filled = torch.zeros(bucket.rows, dtype=torch.int64), 0
    for row, example in enumerate(batch):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels = torch.tensor(example.labels)
        starts[row] = (labels != IGNORED).int().argmax()
        (labelled,) = (labels[1:] != IGNORED).nonzero(as_tuple=True)  # position t predicts token t + 1
        here = slice(filled, filled + len(labelled))
        targets[here], positions[here] = labels[labelled + 1], row * bucket.length + labelled
        filled = here.stop
    return {"input_ids": input_ids, "targets": targets, "positions": positions, "starts": starts}


def _labels(example: Example) -> int:
    return sum(label != IGNORED for label in example.labels[1:])


def _up(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE
