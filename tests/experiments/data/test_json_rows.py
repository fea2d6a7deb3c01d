"""Arrays and lines of JSON, read piece by piece: the values and places that json finds in the whole text."""

import codecs
import json
import random
import tracemalloc

import pytest

from experiments.data import json_rows, opened
from experiments.data.rows import rows_of
from experiments.errors import UserError

ENCODINGS = {"utf-8": b"", "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
ENCODINGS["utf-32-le"] = codecs.BOM_UTF32_LE


@pytest.fixture(autouse=True)
def few_bytes_at_once(monkeypatch):
    monkeypatch.setattr(opened, "AT_ONCE", 7)
    monkeypatch.setattr(json_rows, "AT_ONCE", 7)


def tree(rng: random.Random, depth: int = 3):
    kinds = ["text", "number", "word", *(["list", "object"] if depth else [])]
    kind = rng.choice(kinds)
    if kind == "text":
        return "".join(rng.choices('ab"\\\n ü€😀\u2028[]{},:', k=rng.randrange(20)))
    if kind == "number":
        return rng.choice([0, -7, 12345678901234567890, 1.5e-7, -0.25, rng.randrange(10**9)])
    if kind == "word":
        return rng.choice([True, False, None])
    if kind == "list":
        return [tree(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(i): tree(rng, depth - 1) for i in range(rng.randrange(4))}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("seed", range(12))
def test_an_array_has_the_elements_that_json_finds(tmp_path, encoding, seed):
    rng, path = random.Random(seed), tmp_path / "c.json"
    values = [tree(rng) for _ in range(20)]
    text = " \n" + json.dumps(values, ensure_ascii=seed % 2 == 0, indent=(None, 1, "\t")[seed % 3]) + "\n "
    path.write_bytes(ENCODINGS[encoding] + text.encode(encoding))
    rows = list(rows_of(str(path)))
    assert [row.read() for row in rows] == values
    if seed % 3 == 0:
        assert {row.where for row in rows} == {f"{path}:2"}
    else:
        indent = "\t" if seed % 3 == 2 else " "
        starts = [n for n, line in enumerate(text.split("\n"), 1) if line[:1] == indent and line[1:2] not in " \t]}"]
        assert [row.where for row in rows] == [f"{path}:{n}" for n in starts]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lines_of_every_encoding(tmp_path, encoding):
    values = [tree(random.Random(seed)) for seed in range(30)]
    text = "\r\n\n".join(json.dumps([value], ensure_ascii=False)[1:-1] for value in [{}, *values])
    (tmp_path / "c.jsonl").write_bytes(ENCODINGS[encoding] + text.encode(encoding))
    rows = list(rows_of(str(tmp_path / "c.jsonl")))
    assert [row.read() for row in rows] == [{}, *values]
    assert [row.where for row in rows] == [f"{tmp_path / 'c.jsonl'}:{2 * i + 1}" for i in range(31)]


BROKEN = ['[{"a": 1},\n {"b" 2}]', "[1, 2", '["ab\ncd"]', '[1, "unended', "[1\n 2]", "[tru]", "[1] x", '[{"a": "\\q"}]']


@pytest.mark.parametrize("text", BROKEN)
def test_a_mistake_has_the_place_that_json_says(tmp_path, text):
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(text)
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError) as ours:
        list(rows_of(str(tmp_path / "c.json")))
    want = f"c.json:{theirs.value.lineno}: not JSON: {theirs.value.msg} at column {theirs.value.colno}"
    assert str(ours.value).endswith(want)


def test_a_mistake_far_from_the_end_is_said_at_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(json_rows, "pieces", lambda path: (read.append(p) or p for p in ["[{1: 2},", *["3," * 9] * 99]))
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(UserError, match=r"c.json:1: not JSON: Expecting property name"):
        list(rows_of(str(tmp_path / "c.json")))
    assert len(read) < 9


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_little_of_a_large_file_is_in_memory(tmp_path, encoding, monkeypatch):
    for module in (opened, json_rows):
        monkeypatch.setattr(module, "AT_ONCE", 2**14)
    row = json.dumps({"prompt": "p" * 200, "completion": "c" * 200})
    (tmp_path / "c.json").write_bytes(ENCODINGS[encoding] + f"[{','.join([row] * 9000)}]".encode(encoding))
    assert (tmp_path / "c.json").stat().st_size > 2**21
    tracemalloc.start()
    count = sum(1 for _ in rows_of(str(tmp_path / "c.json")))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 9000 and most < 2**19
