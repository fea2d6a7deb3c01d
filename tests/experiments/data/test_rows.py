"""Rows of every kind of file, folders of files, and what is said of those that cannot be read."""

import csv
import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from experiments.data.paths import files_of
from experiments.data.rows import ROWS, rows_of
from experiments.data.samples import load_data
from experiments.errors import UserError
from tests.experiments.data.conversations import chat, jsonl_config, pairs, read_conversations, write
from tests.experiments.data.templates import QWEN3
from tests.experiments.data.templates import tokenizer as template_tokenizer

PAIRS = [{"prompt": f'q{i}, "ü"\nline', "completion": f"a{i}"} for i in range(5)]
MESSAGES = [chat('user: q0, "ü"\nline'.replace("q0", f"q{i}"), f"assistant: a{i}") for i in range(5)]
has_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
has_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")


def write_csv(path: Path, rows: list[dict], **options) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys(), **options)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_gzip(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


WRITERS = {
    "c.jsonl": lambda path: write(path, *PAIRS),
    "c.json": lambda path: path.write_text(json.dumps(PAIRS)),
    "c.jsonl.gz": lambda path: write_gzip(path, "\n".join(map(json.dumps, PAIRS))),
    "c.json.gz": lambda path: write_gzip(path, json.dumps(PAIRS, indent=1)),
    "c.csv": lambda path: write_csv(path, PAIRS),
    "c.tsv": lambda path: write_csv(path, PAIRS, delimiter="\t"),
    "c.parquet": lambda path: write_parquet(path, PAIRS),
}


@pytest.mark.parametrize("name", [*list(WRITERS)[:-1], pytest.param("c.parquet", marks=has_pyarrow)])
def test_every_kind_of_file_gives_the_same_conversations(tmp_path, name):
    WRITERS[name](tmp_path / name)
    conversations, ignored = read_conversations(str(tmp_path / name))
    assert [c.messages for c in conversations] == MESSAGES and not ignored
    place = conversations[1].where.removeprefix(str(tmp_path / name))
    assert place == {".csv": ":4", ".tsv": ":4", ".parquet": ", row 2"}.get(Path(name).suffix, place)


def test_cells_hold_lists_as_json_and_empty_ones_are_not_there(tmp_path):
    rows = [{"messages": json.dumps(chat("user: q", "assistant: a")), "tools": "", "prompt": ""}]
    write_csv(tmp_path / "c.csv", rows)
    [only], _ = read_conversations(str(tmp_path / "c.csv"))
    assert only.messages == chat("user: q", "assistant: a") and only.tools is None


@has_pyarrow
def test_nulls_that_arrow_adds_are_left_out(tmp_path):
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("f", {"x": 1}), ("g", {"y": "2"}))
    ]
    rows = [
        {"messages": [*chat("user: q"), {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls
    ]
    write_parquet(tmp_path / "c.parquet", rows)
    conversations, ignored = read_conversations(str(tmp_path / "c.parquet"))
    assert [c.messages[1]["tool_calls"] for c in conversations] == [[call] for call in calls] and not ignored


@has_datasets
def test_data_sets_that_were_saved(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(PAIRS)
    whole.save_to_disk(tmp_path / "whole", num_shards=2)
    conversations, _ = read_conversations(str(tmp_path / "whole"))
    assert [c.messages for c in conversations] == MESSAGES
    whole.select([3, 1]).save_to_disk(tmp_path / "some")
    conversations, _ = read_conversations(str(tmp_path / "some"))
    assert [c.messages for c in conversations] == [MESSAGES[3], MESSAGES[1]]
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"both has the splits test, train: choose one, .*data.path=.*/both/train"):
        read_conversations(str(tmp_path / "both"))
    assert len(read_conversations(str(tmp_path / "both" / "test"))[0]) == 5


def test_a_folder_and_a_pattern(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("b.jsonl", "a.jsonl", "in/c.jsonl")):
        write(tmp_path / name, *pairs(20)[i::3])
    (tmp_path / "README.md").write_text("text")
    (tmp_path / ".hidden.jsonl").write_text("no")
    found, others = files_of(str(tmp_path), ROWS)
    assert [str(Path(file).relative_to(tmp_path)) for file in found] == ["a.jsonl", "b.jsonl", "in/c.jsonl"]
    assert [Path(file).name for file in others] == ["README.md"]
    data = load_data(jsonl_config(str(tmp_path)), tokenizer)
    assert len(data.train) + len(data.heldout) == 20 and data.note.endswith("; files left out: README.md")
    assert len(files_of(str(tmp_path / "[ab].jsonl"), ROWS)[0]) == 2
    with pytest.raises(UserError, match=r"x\*: no file has such a name"):
        files_of(str(tmp_path / "x*"), ROWS)
    for name in ("train-0.jsonl", "test-0.jsonl"):
        write(tmp_path / "in" / name, *pairs(1))
    with pytest.raises(UserError, match=r"this folder has files of test, train: choose one, such as .*/in/train\*"):
        files_of(str(tmp_path / "in"), ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", b"prompt,completion\nq,a,b\n", r"c.csv:2: 3 cells under 2 titles: quote cells with commas"),
        ("c.csv", b'prompt,completion\n"q,a\n', r"c.csv:\d: not CSV: "),
        ("c.csv", b"prompt,completion\n", r"c.csv: no rows in this file"),
        ("c.csv", b"prompt,completion\nq,\xff\n", r"c.csv:\d: not UTF-8"),
        ("c.csv", b"prompt,answer\nq,a\n", r"c.csv:2: unknown format with keys .*; completion is missing"),
        ("c.jsonl.gz", b"{}", r"c.jsonl.gz: cannot read this file: Not a gzipped file"),
        ("c.jsonl.gz", gzip.compress(b'{"prompt": "p"}' * 99, mtime=0)[:-9], r"c.jsonl.gz: not a whole gzip file: "),
        pytest.param("c.parquet", b"PAR1", r"c.parquet: not a whole Parquet file: ", marks=has_pyarrow),
        pytest.param("c.arrow", b"ARROW", r"c.arrow: not a whole Arrow file: ", marks=has_pyarrow),
        ("c.jsonl", b'{"text": "t"}', r"c.jsonl:1: unknown format .*; for plain text use data=text"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_conversations(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"c.parquet: reading this file takes pyarrow: pip install pyarrow"):
        list(rows_of(str(tmp_path / "c.parquet")))


def test_bad_rows_are_an_error_or_counted(tmp_path, tokenizer):
    wrong = ["{", {"prompt": "p"}, {"prompt": "p", "completion": "c" * 500}, {"messages": []}, "\x00"]
    path = write(tmp_path / "c.jsonl", *pairs(30), *wrong)
    with pytest.raises(UserError, match=r"c.jsonl:31: not JSON"):
        load_data(jsonl_config(path), tokenizer)
    data = load_data(jsonl_config(path, bad="skip", too_long="drop"), tokenizer)
    assert len(data.train) + len(data.heldout) == 30
    assert f"; 4 bad rows skipped: {path}:31: not JSON" in data.note and data.note.endswith(", …")
    assert all(f"{path}:{line}: " in data.note for line in (31, 32, 34)) and "\n" not in data.note
    with pytest.raises(UserError, match=r"c.jsonl:33: 5\d\d tokens, but data.max_length is 256"):
        load_data(jsonl_config(path, bad="skip"), tokenizer)
    with pytest.raises(UserError, match=r"none.jsonl: too few good rows are left: 5 bad rows skipped: .*none.jsonl:1"):
        load_data(jsonl_config(write(tmp_path / "none.jsonl", *wrong[:2], *wrong[3:], "["), bad="skip"), tokenizer)


def test_rows_that_the_template_refuses_are_bad_too_and_others_take_their_place(tmp_path):
    thinks = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": []}]}
    calls = [
        {"messages": [{"role": "user", "content": f"q{i}"},
                      {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]}
        for i in range(20)
    ]  # fmt: skip
    path = write(tmp_path / "c.jsonl", *pairs(20), *calls, thinks)
    tokenizer = template_tokenizer(QWEN3)
    with pytest.raises(UserError, match=r"c.jsonl:\d+: the tokenizer's chat template leaves out tool_calls"):
        load_data(jsonl_config(path), tokenizer)
    data = load_data(jsonl_config(path, bad="skip", max_train=12, max_heldout=1), tokenizer)
    assert (len(data.train), len(data.heldout)) == (12, 1) and "bad rows skipped" in data.note
    assert data.train == load_data(jsonl_config(path, bad="skip"), tokenizer).train[:12]
