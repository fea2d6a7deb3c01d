"""Large files: tokens made by several processes, kept in the cache, made again where they are damaged."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest

from experiments.config import DataConfig
from experiments.data import samples
from experiments.data.chat import encode, split
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.system import machine, progress
from experiments.system.workers import in_order
from modules.files.checked import read_checked
from tests.experiments.data.conversations import chat, jsonl_config, pairs, read_conversations, write
from tests.experiments.data.templates import QWEN3
from tests.experiments.data.templates import tokenizer as template_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in which every file is large."""
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(samples, "LARGE", 1)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    return tmp_path / "cache"


def made(cache) -> list[str]:
    return sorted(path.name for path in cache.glob("data-*"))


def test_several_processes_make_the_samples_of_one(tmp_path, cache, tokenizer, monkeypatch, capsys):
    rows = [
        {"messages": chat("user: q1", f"assistant: one {i}", "user: q2", f"assistant: two ü{i}")} for i in range(999)
    ]
    path, tokenizer = write(tmp_path / "c.jsonl", *rows), template_tokenizer(QWEN3)
    parallel = load_data(jsonl_config(path, max_heldout=70), tokenizer)
    assert "tokenizing once; the tokens are kept in" in capsys.readouterr().out
    assert [part.samples.ids.filename.parent.name for part in (parallel.train, parallel.heldout)] == made(cache) * 2
    monkeypatch.setattr(samples, "LARGE", 2**30)
    alone = load_data(jsonl_config(path, max_heldout=70), tokenizer)
    assert parallel == alone and parallel.fingerprint == alone.fingerprint
    every = [one for c in read_conversations(path)[0] for one in split(c, tokenizer, "all")]
    expected = {
        (tuple(e.input_ids), tuple(e.labels), e.reference) for e in (encode(c, tokenizer, 256, "error") for c in every)
    }
    assert {(tuple(e.input_ids), tuple(e.labels), e.reference) for e in parallel.train} < expected
    assert len(parallel.heldout) == 70 and len(set(map(str, parallel.train))) == len(parallel.train)


def test_the_cache_is_keyed_by_content_and_settings(tmp_path, cache, tokenizer, capsys):
    path = write(tmp_path / "c.jsonl", *pairs(50))
    first = load_data(jsonl_config(path), tokenizer)
    keys = made(cache)
    capsys.readouterr()
    shutil.copy(path, tmp_path / "moved.jsonl")
    assert load_data(jsonl_config(str(tmp_path / "moved.jsonl"), answer_tokens=3), tokenizer) == first
    assert made(cache) == keys and not capsys.readouterr().out
    for changed in (
        lambda: load_data(jsonl_config(path, max_train=3), tokenizer),
        lambda: load_data(jsonl_config(path, chat_template="chatml"), template_tokenizer(None)),
        lambda: load_data(jsonl_config(path, heldout_path=path), tokenizer),
        lambda: load_data(jsonl_config(write(tmp_path / "c.jsonl", *pairs(51))), tokenizer),
    ):
        changed()
        assert len(made(cache)) == len(keys) + 1
        keys = made(cache)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "about"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, tokenizer, capsys, damage):
    cfg = jsonl_config(write(tmp_path / "c.jsonl", *pairs(50)))
    fingerprint = load_data(cfg, tokenizer).fingerprint
    [folder] = cache.glob("data-*")
    content = (folder / "ids.bin").read_bytes()
    if damage == "cut":
        (folder / "ids.bin").write_bytes(content[:-4])
    elif damage == "flip":
        (folder / "ids.bin").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "gone":
        (folder / "train.bin").unlink()
    else:
        (folder / "about.json").write_text("{")
    (partial := cache / f".{folder.name}.1.partial").mkdir()  # of a process that was killed
    capsys.readouterr()
    assert load_data(cfg, tokenizer).fingerprint == fingerprint and not partial.exists()
    assert f"note: {folder} is damaged, so it is made again" in capsys.readouterr().err
    assert (folder / "ids.bin").read_bytes() == content and json.loads(read_checked(folder / "about.json"))


def test_nothing_is_left_of_what_failed(tmp_path, cache, tokenizer):
    path = write(tmp_path / "c.jsonl", *pairs(999), {"prompt": "p", "completion": "c" * 999})
    with pytest.raises(UserError, match=r"c.jsonl:1000: \d+ tokens, but data.max_length is 256"):
        load_data(jsonl_config(path), tokenizer)
    assert not list(cache.glob("*data-*/"))


def test_large_text(tmp_path, cache, tokenizer):
    (tmp_path / "t.txt").write_text("abcdefghij" * 40)
    cfg = DataConfig(name="text", source="text", path=str(tmp_path / "t.txt"), max_length=10, max_heldout=3)
    data = load_data(cfg, tokenizer)
    assert made(cache) and data == load_data(cfg, tokenizer)
    assert [tokenizer.decode(e.input_ids) for e in data.train] == ["abcdefghij"] * 36 and len(data.heldout) == 3
    assert data.train[0].labels == data.train[0].input_ids and data.train[0].prompt_ids is None


def test_documents_in_rows(tmp_path, tokenizer):
    tokenizer = template_tokenizer(None)
    rows = [{"text": "abc"}, {"text": None}, {"text": "defg", "id": 1}]
    cfg = DataConfig(name="text", source="text", path=write(tmp_path / "t.jsonl", *rows), max_length=9)
    cfg = replace(cfg, heldout_path=write(tmp_path / "h.jsonl", rows[0]))
    with pytest.raises(
        UserError, match=r"t.jsonl:2: text is missing among the keys 'text': for conversations use data"
    ):
        load_data(cfg, tokenizer)
    data = load_data(replace(cfg, bad="skip"), tokenizer)
    assert "".join(tokenizer.decode(e.input_ids) for e in data.train) == "abc<|endoftext|>defg<|endoftext|>"
    assert data.note.endswith("t.jsonl:2: text is missing among the keys 'text': for conversations use data=jsonl")


def test_a_log_file_gets_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0)
    with progress.Count("tokenizing", "rows", total=4000) as count:
        count.advance(1000)
    with progress.Count("reading", "rows") as count:
        count.advance(1000)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("tokenizing 1,000 of 4,000 rows  ") and first.endswith(" s left")
    assert second == "reading 1,000 rows"


def killed(part: int) -> int:
    if part == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return part


def test_work_comes_back_in_order_and_a_killed_process_is_told():
    assert list(in_order(lambda part: part * part, range(50), 2)) == [part * part for part in range(50)]
    with pytest.raises(UserError, match="one of 2 processes was killed"):
        list(in_order(killed, range(9), 2))


def test_the_processes_read_no_more_than_they_need():
    read = []
    results = in_order(abs, (read.append(i) or i for i in range(1000)), 2)
    next(results)
    assert len(read) < 20
    results.close()


def test_a_cache_that_cannot_be_written(tmp_path, cache, tokenizer):
    cache.write_text("a file")
    with pytest.raises(UserError, match="set QDORA_CACHE to a folder"):
        load_data(jsonl_config(write(tmp_path / "c.jsonl", *pairs(50))), tokenizer)
