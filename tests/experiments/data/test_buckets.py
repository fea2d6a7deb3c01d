"""Buckets hold the batches, and a filled one has the batch's tokens and labels and nothing else."""

import pytest
import torch

from experiments.data.buckets import MOST, Bucket, bucket_of, buckets, fill, shape
from experiments.data.chat import IGNORED, Example
from experiments.data.samples import collate, epoch_batches


def examples(count: int = 90) -> list[Example]:
    lengths = torch.randint(2, 600, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(list(range(n)), [IGNORED] * (n // 2) + list(range(n // 2, n))) for n in lengths]


@pytest.mark.parametrize("batch_size", [1, 4, 200])
def test_hold_every_batch_of_the_first_epoch(batch_size):
    data = examples()
    found = buckets(data, batch_size, seed=0)
    assert 1 <= len(found) <= MOST and found == sorted(found)
    for batch in epoch_batches(data, batch_size, 0, 0):
        bucket = bucket_of(batch, found)
        assert bucket.holds(shape(batch))
        assert bucket.length % 64 == 0 and bucket.labels <= bucket.rows * bucket.length
        assert not any(other.holds(shape(batch)) and other < bucket for other in found)
    assert bucket_of([Example([0] * 700, [0] * 700)], found) is None


def test_fill():
    batch = [Example([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), Example([3, 4], [3, 4])]
    filled = fill(batch, Bucket(length=6, labels=5, rows=3), pad_id=9)
    assert filled["input_ids"].tolist() == [[5, 6, 7, 8, 9, 9], [3, 4, 9, 9, 9, 9], [9] * 6]
    assert filled["targets"].tolist() == [7, 8, 4, IGNORED, IGNORED]
    assert filled["positions"].tolist() == [1, 2, 6, 0, 0]
    assert filled["starts"].tolist() == [2, 0, 0]


def test_a_batch_in_its_own_shape_is_the_collated_one():
    batch = examples(5)
    filled, collated = fill(batch, shape(batch), 0), collate(batch, 0)
    assert torch.equal(filled["input_ids"], collated["input_ids"])
    labels = torch.nn.functional.pad(collated["labels"][:, 1:], (0, 1), value=IGNORED)
    assert torch.equal(filled["targets"], labels[labels != IGNORED])
    assert torch.equal(filled["positions"], (labels != IGNORED).flatten().nonzero().flatten())
