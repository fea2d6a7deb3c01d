"""Packs: every sample once, little padding, the same after a stop; the tensors of a pack."""

import random

import pytest

from experiments.data.chat import IGNORED, Example
from experiments.data.packing import check_lengths, collate_pack, epoch_packs, packs, share
from experiments.errors import UserError


def examples(count: int, longest: int = 100, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    lengths = [rng.randint(2, longest) for _ in range(count)]
    return [Example([i] * length, [i] * length) for i, length in enumerate(lengths)]


def sizes(pack: list[Example]) -> list[int]:
    return [len(example.input_ids) for example in pack]


def test_an_epoch_serves_every_sample_once_in_packs_that_hold_it():
    some = examples(500)
    found = epoch_packs(some, 256, seed=1, epoch=0)
    assert sorted(example.input_ids[0] for pack in found for example in pack) == list(range(500))
    assert all(sum(sizes(pack)) <= 256 for pack in found)


def test_little_is_padding():
    some = examples(2000)
    found = epoch_packs(some, 256, seed=0, epoch=0)
    assert sum(map(sum, map(sizes, found))) > 0.97 * 256 * len(found)


def test_the_order_depends_on_seed_and_epoch_alone():
    some = examples(60)
    first = epoch_packs(some, 128, seed=0, epoch=0)
    assert first == epoch_packs(some, 128, seed=0, epoch=0)
    assert first != epoch_packs(some, 128, seed=0, epoch=1)
    assert first != epoch_packs(some, 128, seed=1, epoch=0)


@pytest.mark.parametrize("start", [0, 1, 17, 40, 75])
def test_the_stream_goes_on_where_it_stopped(start):
    some = examples(60)
    whole, rest = packs(some, 128, seed=3), packs(some, 128, seed=3, start=start)
    served = [next(whole) for _ in range(start + 30)]
    assert len(served) > len(epoch_packs(some, 128, 3, 0))  # the stream crosses epochs
    assert [next(rest) for _ in range(30)] == served[start:]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_by_tokens(processes):
    pack = examples(12)
    parts = [share(pack, rank, processes) for rank in range(processes)]
    assert sorted(size for part in parts for size in sizes(part)) == sorted(sizes(pack))
    loads = [sum(sizes(part)) for part in parts]
    assert max(loads) - min(loads) <= max(sizes(pack))
    assert share(pack[:1], 1, 2) == []


def test_collate():
    pack = [Example([5, 6, 7], [5, IGNORED, 7]), Example([8, 9], [IGNORED, 9])]
    batch = collate_pack(pack, 8, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    # nothing precedes the first token of a sample, so it has no label
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]]


def test_a_sample_that_fits_no_pack():
    check_lengths(examples(3, longest=10), 10)
    with pytest.raises(
        UserError, match=r"a sample has 12 tokens and a pack trainer\.tokens=10: set trainer\.tokens=12"
    ):
        check_lengths([Example([1] * 12, [1] * 12)], 10)
