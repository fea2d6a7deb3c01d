"""Users' files: every format becomes messages; a bad line is named."""

import pytest

from experiments.data.samples import load_data
from experiments.data.user_files import read_conversations
from experiments.errors import UserError
from tests.experiments.data.conversations import chat, jsonl_config, write


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
