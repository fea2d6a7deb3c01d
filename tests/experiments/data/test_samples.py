"""Data sets: how they are split, limited, put into batches; plain text; the files of conf/data."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from tokenizers.processors import TemplateProcessing

from experiments.config import DataConfig
from experiments.data.chat import IGNORED, Example
from experiments.data.samples import batches, collate, epoch_batches, eval_batches, load_data
from experiments.errors import UserError
from tests.experiments.data.conversations import chat, clone, jsonl_config, pairs, write
from tests.experiments.data.templates import QWEN3
from tests.experiments.data.templates import tokenizer as template_tokenizer

CONF = Path(__file__).resolve().parents[3] / "conf"


def test_split_depends_on_content_only(tmp_path, tokenizer):
    rows = pairs(200) + pairs(20)  # repeated samples stay together
    first = load_data(jsonl_config(write(tmp_path / "a.jsonl", *rows)), tokenizer)
    second = load_data(jsonl_config(write(tmp_path / "b.jsonl", *rows[::-1])), tokenizer)
    assert (first.train, first.heldout) == (second.train, second.heldout)
    assert len(first.train) + len(first.heldout) == 220
    assert 10 <= len(first.heldout) <= 40
    assert not {e.reference for e in first.train} & {e.reference for e in first.heldout}
    n, m = len(first.train), len(first.heldout)
    assert first.note == f"jsonl: {n} of {n} training samples, {m} of {m} held-out samples"


def test_limits_and_dropping(tmp_path, tokenizer):
    path = write(tmp_path / "c.jsonl", *pairs(100))
    whole = load_data(jsonl_config(path), tokenizer)
    few = load_data(jsonl_config(path, max_train=5, max_heldout=2), tokenizer)
    assert (few.train, few.heldout) == (whole.train[:5], whole.heldout[:2])

    length = 44  # samples have 39 to 47 tokens
    short = load_data(jsonl_config(path, max_length=length, too_long="drop"), tokenizer)
    kept = [example for example in whole.train if len(example.input_ids) <= length]
    assert 0 < len(kept) < len(whole.train)
    assert short.train == kept
    dropped = 100 - len(short.train) - len(short.heldout)
    assert short.note.endswith(f"; {dropped} longer than 44 tokens dropped")
    with pytest.raises(UserError, match=r"every training sample is longer than data.max_length=9: raise it"):
        load_data(jsonl_config(path, max_length=9, too_long="drop"), tokenizer)


def test_heldout_file(tmp_path, tokenizer):
    train, heldout = write(tmp_path / "a.jsonl", *pairs(3)), write(tmp_path / "b.jsonl", *pairs(1))
    data = load_data(jsonl_config(train, heldout_path=heldout), tokenizer)
    assert (len(data.train), [e.reference for e in data.heldout]) == (3, ["answer 0"])


def test_a_small_file_still_holds_one_out(tmp_path, tokenizer):
    data = load_data(jsonl_config(write(tmp_path / "a.jsonl", *pairs(2))), tokenizer)
    assert (len(data.train), len(data.heldout)) == (1, 1)
    with pytest.raises(
        UserError, match=r"b.jsonl: 1 different samples are too few to hold out 10% .* data.heldout_path"
    ):
        load_data(jsonl_config(write(tmp_path / "b.jsonl", *pairs(1), *pairs(1))), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "data=jsonl needs data.path=FILE"),
        ({"train_on": "first"}, "data.train_on=first is not one of all, last, everything"),
        ({"source": "text", "name": "text", "path": None}, "data=text needs data.path=FILE"),
        ({"source": "docstrings", "name": "docstrings"}, "data=docstrings reads no file: for c.jsonl use data=jsonl"),
        ({"source": "csv"}, "data.source=csv is not one of docstrings, arithmetic, facts, records, jsonl, text"),
        ({"too_long": "split"}, "data.too_long=split is not one of error, drop, truncate"),
        ({"heldout_fraction": 0.0}, "data.heldout_fraction=0.0 is not between 0 and 1"),
        ({"max_length": 1}, "data.max_length=1 is less than 2"),
        ({"max_train": 0}, "data.max_train=0 is less than 1"),
    ],
)
def test_bad_settings(tokenizer, changes, message):
    with pytest.raises(UserError, match=message):
        load_data(replace(jsonl_config("c.jsonl"), **changes), tokenizer)


def text_config(path: Path, **changes) -> DataConfig:
    return DataConfig(name="text", source="text", path=str(path), max_length=10, **changes)


def test_text_blocks(tmp_path, tokenizer):
    text = "".join(chr(ord("a") + i % 26) for i in range(95))
    (tmp_path / "t.txt").write_text(text)
    data = load_data(text_config(tmp_path / "t.txt", heldout_fraction=0.25), tokenizer)
    # 95 tokens: 71 train (the last one alone predicts nothing), 24 held out
    assert [len(e.input_ids) for e in data.train] == [10] * 7
    assert [len(e.input_ids) for e in data.heldout] == [10, 10, 4]
    assert all(e.labels == e.input_ids for e in (*data.train, *data.heldout))
    assert "".join(tokenizer.decode(e.input_ids) for e in data.train) == text[:70]
    assert "".join(tokenizer.decode(e.input_ids) for e in data.heldout) == text[71:]
    assert data.note == "text: 7 training and 3 held-out blocks of at most 10 tokens"

    (tmp_path / "h.txt").write_text("held out")
    data = load_data(text_config(tmp_path / "t.txt", heldout_path=str(tmp_path / "h.txt"), max_train=2), tokenizer)
    assert "".join(tokenizer.decode(e.input_ids) for e in data.train) == text[:20]
    assert [tokenizer.decode(e.input_ids) for e in data.heldout] == ["held out"]


def test_text_needs_no_chat_template_but_some_text(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("x" * 14)
    with pytest.raises(UserError, match=r"t.txt: 13 training and 1 held-out tokens are too few"):
        load_data(text_config(tmp_path / "t.txt"), clone(tokenizer, None))
    (tmp_path / "t.txt").write_text("x" * 15)
    assert len(load_data(text_config(tmp_path / "t.txt"), clone(tokenizer, None)).heldout) == 1


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    lengths = [2 + (i * 7919) % 251 for i in range(1003)]
    return [Example([i] * length, [i] * length) for i, length in enumerate(lengths)]


def which(batch: list[Example]) -> list[int]:
    return [example.input_ids[0] for example in batch]


def padding(batches: list[list[Example]]) -> float:
    lengths = [[len(example.input_ids) for example in batch] for batch in batches]
    return 1 - sum(map(sum, lengths)) / sum(max(row) * len(row) for row in lengths)


def test_an_epoch_serves_every_example_once(examples):
    epoch = epoch_batches(examples, 8, seed=0, epoch=0)
    assert sorted(i for batch in epoch for i in which(batch)) == list(range(1003))
    assert sorted({len(batch) for batch in epoch}) == [3, 8]
    assert padding(epoch) < 0.05
    lengths = [len(batch[0].input_ids) for batch in epoch]
    assert lengths != sorted(lengths)


def test_order_is_a_function_of_seed_and_epoch(examples):
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [which(batch) for batch in epoch_batches(examples, 8, seed, epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    stream = batches(examples, 8, seed=5)
    assert [which(next(stream)) for _ in range(252)] == order(5, 0) + order(5, 1)
    with pytest.raises(ValueError, match="no examples"):
        next(batches([], 8, seed=0))


def test_eval_batches_are_sorted(examples):
    served = eval_batches(examples, 16)
    assert sorted(i for batch in served for i in which(batch)) == list(range(1003))
    longest = [max(len(example.input_ids) for example in batch) for batch in served]
    assert longest == sorted(longest, reverse=True)


def test_collate():
    batch = collate([Example([1, 2, 3], [IGNORED, 2, 3]), Example([4], [4])], pad_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORED, 2, 3], [4, IGNORED, IGNORED]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("name", ["docstrings", "jsonl", "text"])
def test_configs_follow_the_schema(name):
    assert (CONF / "data" / f"{name}.yaml").read_text().startswith("# ")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = compose(overrides=[f"+data={name}", "data.max_train=3"]).data
        assert (data.name, data.source, data.max_train) == (name, name, 3)
        with pytest.raises(ConfigCompositionException, match=r"data.max_lenght"):
            compose(overrides=[f"+data={name}", "data.max_lenght=3"])


def test_text_begins_and_ends_as_the_tokenizer_has_it(tmp_path):
    with_bos = template_tokenizer(None)
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    text = "".join(chr(97 + i % 26) for i in range(100))
    (tmp_path / "t.txt").write_text(text)
    data = load_data(text_config(tmp_path / "t.txt", heldout_fraction=0.25), with_bos)
    assert data.train[0].input_ids == with_bos(text)["input_ids"][:10]
    assert all(e.input_ids[0] == bos and len(e.input_ids) <= 10 for e in (*data.train, *data.heldout))
    assert data.heldout[-1].input_ids[-1] == with_bos.eos_token_id
    read = [token for e in (*data.train, *data.heldout) for token in e.input_ids[1:]]
    assert with_bos.decode(read) == text + with_bos.eos_token


def test_which_turns_are_trained_on(tmp_path):
    rows = [{"messages": chat("user: q1", f"assistant: one {i}", "user: q2", f"assistant: two {i}")} for i in range(9)]
    path, tokenizer = write(tmp_path / "c.jsonl", *rows), template_tokenizer(QWEN3)
    every, last = (load_data(jsonl_config(path, train_on=which), tokenizer) for which in ("all", "last"))
    assert len(every.train) == 2 * len(last.train) and {"one", "two"} == {e.reference[:3] for e in every.train}
    assert {e.reference[:3] for e in last.train} == {"two"}
    n = len(last.train)
    assert f"{2 * n} training samples, one a turn, of {n} conversations" in every.note
    assert len(load_data(jsonl_config(path, max_train=3), tokenizer).train) == 3
