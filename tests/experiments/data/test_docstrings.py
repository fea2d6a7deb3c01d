"""Functions and their docstrings, read from a made-up standard library."""

import ast
from pathlib import Path

import pytest

from experiments.config import DataConfig
from experiments.data import sources
from experiments.data.docstrings import docstring_pairs
from experiments.data.samples import load_data
from experiments.errors import UserError
from modules.files.checked import read_checked, with_checksum


@pytest.fixture
def stdlib(tmp_path, monkeypatch) -> Path:
    """A standard library of 30 small modules, and things to leave out; the cache is beside it."""
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "cache"))
    functions = (Path(__file__).parent / "documented_functions.txt").read_text()
    root = tmp_path / "lib"
    for name in [f"pack/mod{i}.py" for i in range(30)] + ["test/test_a.py", "site-packages/other.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(functions.replace("{name}", name))
    (root / "template.py").write_text("def {{ name }}(): pass")
    (root / "latin.py").write_bytes(b"# \xe9")
    return root


def test_docstring_pairs(stdlib):
    pairs = docstring_pairs(stdlib)
    assert {pair.module for pair in pairs} == {f"pack/mod{i}.py" for i in range(30)}
    first = [pair for pair in pairs if pair.module == "pack/mod0.py"]
    assert {pair.function: pair.summary for pair in first} == {
        "Shelf.first": "Return the first book of the shelf pack/mod0.py.",
        "outer": "Call the function inside of pack/mod0.py.",
        "outer.inner": "Do what the inner function of pack/mod0.py does",
        "same": "Return what every module of them returns.",
    }
    assert (
        first[0].source == '@property\ndef first(self):\n    text = """not\nindented"""\n    return self.books[0], text'
    )
    for pair in pairs:
        [function] = ast.parse(pair.source).body
        assert ast.get_docstring(function) is None
    assert sum(pair.function == "same" for pair in pairs) == 1  # the same answer in 30 modules counts once


def test_docstring_cache(stdlib, monkeypatch):
    pairs = docstring_pairs(stdlib)
    [cache] = (stdlib.parent / "cache").iterdir()
    content = cache.read_text()

    changed = read_checked(cache).replace("Return the first book", "Read from the cache")
    cache.write_text(with_checksum(changed))
    assert docstring_pairs(stdlib)[0].summary.startswith("Read from the cache")
    flipped = content.replace("Return the first book", "Return the last book")
    for damaged in content[: len(content) // 2], "", "[]", '[{"module": "m"}]', "7", flipped:
        cache.write_text(damaged)
        assert docstring_pairs(stdlib) == pairs
        assert cache.read_text() == content

    monkeypatch.setattr("experiments.data.docstrings.EXTRACTOR_VERSION", -1)
    docstring_pairs(stdlib)
    assert len(list(cache.parent.iterdir())) == 2

    with pytest.raises(UserError, match="no documented functions"):
        docstring_pairs(stdlib.parent / "cache")

    (stdlib.parent / "file").write_text("")
    monkeypatch.setenv("QDORA_CACHE", str(stdlib.parent / "file"))
    with pytest.raises(UserError, match=r"cannot write to .*: set QDORA_CACHE to a folder that can"):
        docstring_pairs(stdlib)


def test_docstring_data(stdlib, monkeypatch, tokenizer):
    monkeypatch.setattr(sources, "docstring_pairs", lambda: docstring_pairs(stdlib))
    cfg = DataConfig(name="docstrings", source="docstrings", max_length=1000, heldout_fraction=0.3)
    data = load_data(cfg, tokenizer)
    assert data == load_data(cfg, tokenizer)
    modules = [
        {e.reference.rsplit(" ")[-1] for e in part if "shelf" in e.reference} for part in (data.train, data.heldout)
    ]
    assert modules[0] and modules[1] and not modules[0] & modules[1]
    assert f"({len(modules[0])} modules)" in data.note and f"({len(modules[1])} modules)" in data.note
    assert tokenizer.decode(data.heldout[0].prompt_ids).startswith("<|im_start|>system\nSay in one sentence")
