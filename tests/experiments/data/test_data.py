import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from experiments.config import DataConfig
from experiments.data import samples as data_module
from experiments.data.chat import IGNORED, Conversation, Example, encode
from experiments.data.docstrings import docstring_pairs
from experiments.data.samples import batches, collate, epoch_batches, eval_batches, load_data
from experiments.data.user_files import read_conversations
from experiments.errors import UserError

CONF = Path(__file__).resolve().parents[3] / "conf"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, plus ChatML's. Offsets leave spaces out, as SmolLM2's and GPT-2's do."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.post_processor = processors.ByteLevel(trim_offsets=True)
    bytewise.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    fast = PreTrainedTokenizerFast(tokenizer_object=bytewise, additional_special_tokens=specials)
    fast.chat_template = CHATML
    return fast


def clone(tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer with another chat template."""
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    other.chat_template = template
    return other


def chat(*turns: str) -> list[dict[str, str]]:
    """Messages from "role: content" strings."""
    return [dict(zip(("role", "content"), turn.split(": ", 1))) for turn in turns]


def conversation(*turns: str) -> Conversation:
    return Conversation(chat(*turns), "chats.jsonl:1", "group")


def labelled(tokenizer, example: Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def write(path: Path, *rows: object) -> str:
    """A JSON Lines file of rows; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def jsonl_config(path: str, **changes) -> DataConfig:
    return DataConfig(name="jsonl", source="jsonl", path=path, **changes)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}" + "!" * (i % 7)} for i in range(count)]


# Files


def test_every_format_becomes_the_same_messages(tmp_path):
    path = write(
        tmp_path / "chats.jsonl",
        {"messages": chat("user: Hi\n\nthere", "assistant: Hello.")},
        "",
        {"conversations": [{"from": "human", "value": "Hi\n\nthere"}, {"from": "gpt", "value": "Hello."}]},
        {"instruction": "Hi", "input": "there", "output": "Hello."},
        {"instruction": "Hi\n\nthere", "input": "", "output": "Hello."},
        {"prompt": "Hi\n\nthere", "completion": "Hello."},
    )
    conversations, ignored = read_conversations(path)
    assert [c.messages for c in conversations] == [chat("user: Hi\n\nthere", "assistant: Hello.")] * 5
    assert [c.where for c in conversations] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6)]
    assert len({c.group for c in conversations}) == 1
    assert not ignored


def test_system_message_and_multiple_turns(tmp_path):
    roles = [("system", "Be brief."), ("human", "A"), ("gpt", "a"), ("user", "B"), ("assistant", "b")]
    path = write(tmp_path / "c.jsonl", {"conversations": [{"from": role, "value": text} for role, text in roles]})
    [only], _ = read_conversations(path)
    assert only.messages == chat("system: Be brief.", "user: A", "assistant: a", "user: B", "assistant: b")


def test_other_keys_are_reported(tmp_path, tokenizer):
    rows = [
        {"id": i, "messages": [{"role": "user", "content": f"{i}", "weight": 1}] + chat("assistant: a")}
        for i in range(9)
    ]
    data = load_data(jsonl_config(write(tmp_path / "c.jsonl", *rows)), tokenizer)
    assert data.note.endswith("; ignored keys: id, messages[].weight")


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'prompt': 1}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ([1], "a line must hold a JSON object, not a list"),
        (
            {"prompt": "p", "answer": "a"},
            "unknown format with keys 'prompt', 'answer': expected messages, conversations",
        ),
        ({}, "unknown format with keys none"),
        ({"messages": "hello"}, "messages must be a list, not a string"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object, not a string"),
        ({"messages": []}, "the conversation has no assistant turn"),
        ({"messages": [USER]}, "the conversation has no assistant turn"),
        ({"messages": [ANSWER]}, "the conversation must begin with a user turn"),
        ({"messages": [USER, ANSWER, {"role": "system", "content": "s"}]}, "a system message must come first"),
        ({"messages": [{"role": "human", "content": "u"}, ANSWER]}, r"messages\[0\]: role is 'human', expected one of"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"messages\[1\]: content is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"messages\[1\]: content must be a string, not null",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\]: content is missing"),
        (
            {"conversations": [{"from": "bot", "value": "v"}]},
            r"conversations\[0\]: from is 'bot', expected one of system, h",
        ),
        ({"instruction": "i", "output": ["o"]}, "output must be a string, not a list"),
        ({"instruction": "i", "input": 3, "output": "o"}, "input must be a string, not a number"),
        ({"prompt": "", "completion": "c"}, "prompt is empty"),
        ('{"prompt": "\\ud800", "completion": "c"}', "prompt holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    path = write(tmp_path / "c.jsonl", {"prompt": "p", "completion": "c"}, row)
    with pytest.raises(UserError, match=message) as error:
        read_conversations(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"absent.jsonl: cannot read this file: No such file"):
        read_conversations(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="cannot read this file: Is a directory"):
        read_conversations(str(tmp_path))
    with pytest.raises(UserError, match=r"empty.jsonl: the file is empty"):
        read_conversations(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.txt").write_bytes("ok\nna\u00efve".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt:2: not UTF-8 at byte 5: save the file as UTF-8"):
        read_conversations(str(tmp_path / "latin.txt"))


# Labels


def test_labels_cover_the_answers_and_their_end_tokens(tokenizer):
    sample = conversation("system: S", "user: Hello you", "assistant:  Ünï  code\n ", "user: B", "assistant: b")
    example = encode(sample, tokenizer, 1000, "error")
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHello you<|im_end|>\n<|im_start|>assistant\n"
    text += " Ünï  code\n <|im_end|>\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.input_ids) == text + "b<|im_end|>\n"
    assert labelled(tokenizer, example) == " Ünï  code\n <|im_end|>b<|im_end|>"
    assert all(label in (token, IGNORED) for token, label in zip(example.input_ids, example.labels))
    assert tokenizer.decode(example.prompt_ids) == text
    assert example.reference == "b"


def test_too_long(tokenizer):
    sample = conversation("user: U", "assistant: first", "user: V", "assistant: second")
    ids = encode(sample, tokenizer, 1000, "error").input_ids
    assert encode(sample, tokenizer, len(ids), "error").input_ids == ids
    message = rf"^chats.jsonl:1: {len(ids)} tokens, but data.max_length is 20: raise data.max_length, or set data.too_l"
    with pytest.raises(UserError, match=message):
        encode(sample, tokenizer, 20, "error")
    assert encode(sample, tokenizer, 20, "drop") is None

    cut = encode(sample, tokenizer, 25, "truncate")
    assert cut.input_ids == ids[:25]
    assert labelled(tokenizer, cut) == "first"
    assert tokenizer.decode(cut.prompt_ids) == "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert cut.reference == "first"
    with pytest.raises(UserError, match=r"chats.jsonl:1: none of the first 12 tokens is the assistant's"):
        encode(sample, tokenizer, 12, "truncate")


def test_tokenizers_that_are_not_fit(tmp_path, tokenizer):
    cfg = jsonl_config(write(tmp_path / "c.jsonl", *pairs(9)))
    with pytest.raises(UserError, match="the tokenizer has no chat template: use a chat model or data=text"):
        load_data(cfg, clone(tokenizer, None))

    slow = clone(tokenizer, CHATML)
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(UserError, match="chat data needs a fast tokenizer"):
        load_data(cfg, slow)

    last_differs = clone(tokenizer, CHATML.replace("m.content", "('last: ' if loop.last else '') + m.content"))
    with pytest.raises(UserError, match=r"chats.jsonl:1: the tokenizer's chat template renders message 2 differently"):
        encode(conversation("user: U", "assistant: a", "user: V"), last_differs, 1000, "error")

    refuses = clone(tokenizer, "{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"chats.jsonl:1: .* refuses this conversation: no system role"):
        encode(conversation("user: U", "assistant: a"), refuses, 1000, "error")


# Splits and limits


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
        ({"source": "text", "name": "text", "path": None}, "data=text needs data.path=FILE"),
        ({"source": "docstrings", "name": "docstrings"}, "data=docstrings reads no file: for c.jsonl use data=jsonl"),
        ({"source": "csv"}, "data.source=csv is not one of docstrings, arithmetic, jsonl, text"),
        ({"too_long": "split"}, "data.too_long=split is not one of error, drop, truncate"),
        ({"heldout_fraction": 0.0}, "data.heldout_fraction=0.0 is not between 0 and 1"),
        ({"max_length": 1}, "data.max_length=1 is less than 2"),
        ({"max_train": 0}, "data.max_train=0 is less than 1"),
    ],
)
def test_bad_settings(tokenizer, changes, message):
    with pytest.raises(UserError, match=message):
        load_data(replace(jsonl_config("c.jsonl"), **changes), tokenizer)


# Text


def text_config(path: Path, **changes) -> DataConfig:
    return DataConfig(name="text", source="text", path=str(path), max_length=10, **changes)


def test_text_blocks(tmp_path, tokenizer):
    text = "".join(chr(ord("a") + i % 26) for i in range(95))
    (tmp_path / "t.txt").write_text(text)
    data = load_data(text_config(tmp_path / "t.txt", heldout_fraction=0.25), tokenizer)
    # 95 tokens: 71 train (the last one alone predicts nothing), 24 held out
    assert [len(e.input_ids) for e in data.train] == [10] * 7
    assert [len(e.input_ids) for e in data.heldout] == [10, 10, 4]
    assert all(e.labels == e.input_ids for e in data.train + data.heldout)
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


# Docstrings

FUNCTIONS = '''
import os
\x0c
class Shelf:
    @property
    def first(self):
        """Return the first
        book of the shelf {name}.

        Details follow.
        """

        text = """not
indented"""
        return self.books[0], text

    def short(self):
        """Too short."""
        return 1

    def stub(self):
        """Return nothing, as this is only a stub."""
        raise NotImplementedError

def one_line(): """Return the number one, on one line."""; return 1

def outer():
\t"""Call the function inside of {name}."""
\tdef inner():
\t\t"Do what the inner function of {name} does"
\t\treturn 2
\treturn inner()

def same():
    """Return what every module of them returns."""
    return "{name}"

def sign():
    """sign(x) -> the sign of the number x."""
    return 0
'''


@pytest.fixture
def stdlib(tmp_path, monkeypatch) -> Path:
    """A standard library of 30 small modules, and things to leave out; the cache is beside it."""
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "lib"
    for name in [f"pack/mod{i}.py" for i in range(30)] + ["test/test_a.py", "site-packages/other.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(FUNCTIONS.replace("{name}", name))
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

    cache.write_text(content.replace("Return the first book", "Read from the cache"))
    assert docstring_pairs(stdlib)[0].summary.startswith("Read from the cache")
    for damaged in content[: len(content) // 2], "", "[]", '[{"module": "m"}]', "7":
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
    monkeypatch.setattr(data_module, "docstring_pairs", lambda: docstring_pairs(stdlib))
    cfg = DataConfig(name="docstrings", source="docstrings", max_length=1000, heldout_fraction=0.3)
    data = load_data(cfg, tokenizer)
    assert data == load_data(cfg, tokenizer)
    modules = [
        {e.reference.rsplit(" ")[-1] for e in part if "shelf" in e.reference} for part in (data.train, data.heldout)
    ]
    assert modules[0] and modules[1] and not modules[0] & modules[1]
    assert f"({len(modules[0])} modules)" in data.note and f"({len(modules[1])} modules)" in data.note
    assert tokenizer.decode(data.heldout[0].prompt_ids).startswith("<|im_start|>system\nSay in one sentence")


# Batches


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


# Configuration


@pytest.mark.parametrize("name", ["docstrings", "jsonl", "text"])
def test_configs_follow_the_schema(name):
    assert (CONF / "data" / f"{name}.yaml").read_text().startswith("# ")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = compose(overrides=[f"+data={name}", "data.max_train=3"]).data
        assert (data.name, data.source, data.max_train) == (name, name, 3)
        with pytest.raises(ConfigCompositionException, match=r"data.max_lenght"):
            compose(overrides=[f"+data={name}", "data.max_lenght=3"])
