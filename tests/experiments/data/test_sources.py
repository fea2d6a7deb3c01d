"""Several sources with weights: what an epoch has of each, in which order, and where it goes on."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from hydra import compose, initialize_config_dir

from experiments.config import DataConfig, SourceConfig
from experiments.data.packing import epoch_packs
from experiments.data.samples import batches, epoch_batches, load_data
from experiments.errors import UserError
from experiments.system.keys import CONF
from tests.experiments.data.conversations import write
from tests.experiments.helpers import repeatable_records, tensors


def rows(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name} question {i}", "completion": f"{name} {i}"} for i in range(count)]


@pytest.fixture
def cfg(tmp_path) -> DataConfig:
    """Sources a and b with 60 and 30 samples to train on, and a file of held-out ones."""
    paths = [write(tmp_path / f"{name}.jsonl", *rows(name, count)) for name, count in (("a", 60), ("b", 30))]
    sources = [SourceConfig(path) for path in paths]
    heldout = write(tmp_path / "h.jsonl", *rows("h", 5))
    return DataConfig(name="jsonl", source="jsonl", sources=sources, heldout_path=heldout)


def weighted(cfg: DataConfig, *weights: float) -> DataConfig:
    return replace(cfg, sources=[replace(source, weight=weight) for source, weight in zip(cfg.sources, weights)])


def served(data, seed: int, epoch: int) -> list[str]:
    return [example.reference for batch in epoch_batches(data.train, 8, seed, epoch) for example in batch]


def names(references: list[str]) -> Counter:
    return Counter(reference.split()[0] for reference in references)


def test_without_weights_an_epoch_has_each_sample_once(cfg, tokenizer):
    data = load_data(cfg, tokenizer)
    assert len(data.train) == 90 and len(data.heldout) == 5
    assert len(set(served(data, 0, 0))) == 90


def test_a_weight_is_a_share_of_the_samples_of_an_epoch(cfg, tokenizer):
    data = load_data(weighted(cfg, 1, 2), tokenizer)
    a, b = (source.path for source in cfg.sources)
    assert f"; an epoch has 30 of {a} (60), 60 of {b} (30)" in data.note
    epochs = [served(data, 0, epoch) for epoch in range(4)]
    assert all(names(epoch) == {"a": 30, "b": 60} for epoch in epochs)
    assert set(Counter(epochs[0] + epochs[1]).values()) == {
        1,
        4,
    }  # each of a once in two epochs, each of b twice in one
    assert len({reference for reference in epochs[0] if reference[0] == "a"}) == 30
    assert epochs[0] != epochs[2] and served(data, 1, 0) != epochs[0] == served(data, 0, 0)


def test_packs_have_the_shares_too(cfg, tokenizer):
    data = load_data(weighted(cfg, 1, 2), tokenizer)
    packs = epoch_packs(data.train, 200, seed=0, epoch=1)
    assert sorted(e.reference for pack in packs for e in pack) == sorted(served(data, 0, 1))


def test_shares_that_do_not_divide(cfg, tokenizer):
    for weights in ((1, 1e-9), (0.7, 0.3), (3, 4)):
        data = load_data(weighted(cfg, *weights), tokenizer)
        count = names(served(data, 0, 3))
        assert count.total() == 90 and abs(count["b"] - 90 * weights[1] / sum(weights)) < 1
        many = Counter(reference for epoch in range(7) for reference in served(data, 0, epoch))
        for name in "ab":  # nobody is served more than once more often than another of its source
            of_source = [times for reference, times in many.items() if reference[0] == name]
            assert not of_source or max(of_source) - min(of_source) <= 1


def test_a_stream_goes_on_where_it_was(cfg, tokenizer):
    data = load_data(weighted(cfg, 1, 2), tokenizer)
    whole = list(islice(batches(data.train, 8, seed=3), 40))
    for start in (1, 11, 12, 30):
        assert list(islice(batches(data.train, 8, seed=3, start=start), 40 - start)) == whole[start:]


def test_a_part_is_held_out_of_all_sources_and_limits_are_for_all(cfg, tokenizer):
    data = load_data(replace(weighted(cfg, 1, 1), heldout_path=None, max_train=40, max_heldout=6), tokenizer)
    assert len(data.train) == 40 and len(data.heldout) == 6
    assert names([e.reference for e in data.heldout]).keys() == {"a", "b"}
    assert names(served(data, 0, 0)) == {"a": 20, "b": 20}


def test_text_sources(tmp_path, tokenizer):
    for name, count in (("a", 100), ("b", 50)):
        (tmp_path / f"{name}.txt").write_text(name * count)
    sources = [SourceConfig(str(tmp_path / f"{name}.txt"), weight) for name, weight in (("a", 1), ("b", 3))]
    cfg = DataConfig(name="text", source="text", sources=sources, max_length=10, heldout_fraction=0.2)
    data = load_data(cfg, tokenizer)
    assert [tokenizer.decode(e.input_ids)[0] for e in data.heldout] == ["a", "a", "b"]
    texts = [tokenizer.decode(e.input_ids) for batch in epoch_batches(data.train, 4, 0, 0) for e in batch]
    assert Counter(text[0] for text in texts) == {"a": 3, "b": 9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "x.jsonl"}, "data.path and data.sources: give one of them"),
        (
            {"sources": [SourceConfig("a", 1), SourceConfig("b")]},
            "b has no weight, and others have one: give all or no",
        ),
        (
            {"sources": [SourceConfig(None, 1)]},
            "data.sources: source 1 has no path: give each as {path: FILE, weight: NUMB",
        ),
        ({"sources": [SourceConfig("a", 0)]}, "weight=0 of a: choose a number above 0"),
        ({"sources": [SourceConfig("a", float("nan"))]}, "weight=nan of a: choose a number above 0"),
        ({"source": "docstrings", "name": "docstrings"}, "data=docstrings reads no file: for .*a.jsonl use data=jsonl"),
    ],
)
def test_bad_sources(cfg, tokenizer, change, message):
    with pytest.raises(UserError, match=message):
        load_data(replace(cfg, **change), tokenizer)


def test_a_line_of_a_source_is_named(cfg, tmp_path, tokenizer):
    write(tmp_path / "b.jsonl", *rows("b", 3), {"prompt": "p"})
    with pytest.raises(UserError, match=r"/b.jsonl:4: .*; completion is missing"):
        load_data(weighted(cfg, 1, 1), tokenizer)


def test_sources_on_the_command_line():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = compose(overrides=["+data=jsonl", "data.sources=[{path:a.jsonl,weight:2},{path:b,weight:1}]"]).data
    assert [(source.path, source.weight) for source in data.sources] == [("a.jsonl", 2.0), ("b", 1.0)]


def test_a_run_on_sources_is_resumed_bit_for_bit(command, cfg, tmp_path):
    a, b = (source.path for source in cfg.sources)
    steps = ["trainer.schedule=constant", "trainer.warmup=0", "trainer.checkpoint_every=2", "trainer.samples=0"]
    given = ["+method=lora", "data=jsonl", f"data.sources=[{{path:{a},weight:1}},{{path:{b},weight:2}}]", *steps]
    code, text = command(*given, "trainer.steps=4", f"output_dir={tmp_path / 'whole'}")
    assert code == 0 and "; an epoch has " in text, text
    assert command(*given, "trainer.steps=2", f"output_dir={tmp_path / 'part'}")[0] == 0
    code, text = command(*given, "trainer.steps=4", f"output_dir={tmp_path / 'part'}", "resume=latest")
    assert code == 0, text
    whole, part = (
        [record for record in repeatable_records(tmp_path / name) if "lr" in record] for name in ("whole", "part")
    )
    assert whole == part and len(whole) == 4
    assert tensors(tmp_path / "whole" / "adapter") == tensors(tmp_path / "part" / "adapter")
