"""Users' files: every format becomes messages; a bad line is named."""

import json

import pytest

from experiments.data.samples import load_data
from experiments.errors import UserError
from tests.experiments.data.conversations import chat, jsonl_config, labelled, read_conversations, write


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
    with pytest.raises(UserError, match=r"no file to read in this folder: expected names that end in \.jsonl"):
        read_conversations(str(tmp_path))
    with pytest.raises(UserError, match=r"empty.jsonl: the file is empty"):
        read_conversations(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.txt").write_bytes('{"prompt": "p", "completion": "c"}\nna\u00efve'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt:2: not UTF-8 at byte 2 of the line: save the file as UTF-8"):
        read_conversations(str(tmp_path / "latin.txt"))


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
AS_PEOPLE_HAVE_THEM = {
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": None, "name": None},
        ]
    },
    "nulls beside the format": {"messages": None, "prompt": "u", "completion": "a", "system": None, "tools": None},
    "alpaca with nulls": {"instruction": "u", "input": None, "output": "a", "history": None},
    "lists of messages": {"prompt": [USER], "completion": [ANSWER]},
    "roles in conversations": {"conversations": [USER, ANSWER]},
    "an empty system turn": {
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"},
        ]
    },
}


@pytest.mark.parametrize("row", AS_PEOPLE_HAVE_THEM.values(), ids=AS_PEOPLE_HAVE_THEM)
def test_rows_as_people_have_them(tmp_path, row):
    [only], ignored = read_conversations(write(tmp_path / "c.jsonl", row))
    assert only.messages == [USER, ANSWER] and only.trained is None and not ignored


def test_a_system_key_and_developer_messages(tmp_path):
    system = [{"role": "system", "content": "s"}, USER, ANSWER]
    rows = [
        {"system": "s", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        {"system": "s", "instruction": "u", "output": "a"},
        {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
    ]
    conversations, ignored = read_conversations(write(tmp_path / "c.jsonl", *rows))
    assert [c.messages for c in conversations] == [system] * 3 and not ignored
    with pytest.raises(UserError, match="a system key beside a system message"):
        read_conversations(write(tmp_path / "c.jsonl", {"system": "s", "messages": system}))


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}])
def test_turns_that_are_not_learned_from(tmp_path, tokenizer, switch):
    bad = {"role": "assistant", "content": "BAD"} | switch
    rows = [{"messages": [USER, bad, {"role": "user", "content": f"q{i}"}, ANSWER | {"weight": 1}]} for i in range(9)]
    data = load_data(jsonl_config(write(tmp_path / "c.jsonl", *rows)), tokenizer)
    for example in data.train:
        assert labelled(tokenizer, example) == "a<|im_end|>" and "BAD" in tokenizer.decode(example.input_ids)
    assert "ignored" not in data.note
    with pytest.raises(UserError, match="no assistant turn is to be learned from"):
        read_conversations(write(tmp_path / "c.jsonl", {"messages": [USER, bad]}))
    with pytest.raises(UserError, match=r"messages\[1\]: weight must be 0 or 1, false or true, not 0.5"):
        read_conversations(write(tmp_path / "c.jsonl", {"messages": [USER, ANSWER | {"weight": 0.5}]}))


def test_the_prompt_of_a_conversational_pair_is_not_learned_from(tmp_path):
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    [only], _ = read_conversations(write(tmp_path / "c.jsonl", row))
    assert only.messages == [USER, ANSWER, USER, ANSWER] and only.trained == (3,)


def test_tools_and_reasoning_go_to_the_template(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    asks = {"role": "assistant", "content": None, "tool_calls": [CALL], "thinking": "why"}
    gives = {"role": "tool", "content": "3", "tool_call_id": "1"}
    row = {"messages": [USER, asks, gives, ANSWER], "tools": [tool]}
    [only], ignored = read_conversations(write(tmp_path / "c.jsonl", row))
    parsed = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert only.messages[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "why",
        "tool_calls": [parsed],
    }
    assert only.messages[2] == gives and only.tools == [tool] and not ignored


def test_calls_as_sharegpt_and_older_files_have_them(tmp_path):
    call = {"name": "f", "arguments": {"x": 1}}
    sharegpt = [("human", "u"), ("function_call", json.dumps(call)), ("observation", "3"), ("gpt", "a")]
    older = [{"role": "assistant", "content": None, "function_call": call | {"arguments": '{"x": 1}'}}]
    rows = [
        {"conversations": [{"from": role, "value": text} for role, text in sharegpt]},
        {"messages": [USER, *older, {"role": "function", "name": "f", "content": "3"}, ANSWER]},
    ]
    conversations, ignored = read_conversations(write(tmp_path / "c.jsonl", *rows))
    for conversation in conversations:
        assert conversation.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
        assert conversation.messages[2] | {"role": "tool", "content": "3"} == conversation.messages[2]
    assert not ignored
    bad = {"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": "f(1)"}]}
    with pytest.raises(UserError, match=r"conversations\[1\]: value is not JSON"):
        read_conversations(write(tmp_path / "c.jsonl", bad))


def test_alpaca_history(tmp_path):
    row = {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]]}
    [only], _ = read_conversations(write(tmp_path / "c.jsonl", row))
    assert only.messages == chat("user: q1", "assistant: a1", "user: q2", "assistant: a2")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_and_encodings(tmp_path, encoding, indent):
    rows = [{"prompt": f"ü{i}\u2028", "completion": "a"} for i in range(3)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    array = json.dumps(rows, ensure_ascii=False, indent=indent)
    for text in (lines, array):
        (tmp_path / "c.json").write_bytes(text.encode(encoding))
        conversations, _ = read_conversations(str(tmp_path / "c.json"))
        assert [c.messages[0]["content"] for c in conversations] == [f"ü{i}\u2028" for i in range(3)]
    if indent:
        assert [c.where.rpartition(":")[2] for c in conversations] == ["2", "6", "10"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"prompt": "p"}]', r":2: unknown format"),
        ('[\n{"prompt": "p", "completion": "c"}\n{}]', r":3: not JSON: Expecting ',' delimiter at column 1"),
        ('[{"prompt": "p", "completion": "c"}]\nx', r":2: not JSON: Extra data at column 1"),
        ("[]", ": no rows in this file"),
        ('{"instruction": "q", "input": NaN, "output": "a"}', ":1: not JSON: NaN is not a value in JSON: write null"),
        ("{\0}", ":1: a zero byte, so this is not text in UTF-8: save the file as UTF-8"),
        ("[" * 100_000, ":1: lists or objects in one another"),
    ],
)
def test_files_that_are_no_conversations(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_conversations(str(tmp_path / "c.json"))
    assert str(error.value).startswith(str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": [{"type": "image_url"}]}, r"content\[0\] is of type 'image_url'"),
        ({"role": "assistant", "tool_calls": [{"function": 1}]}, r"tool_calls\[0\]: function must be an object"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}, "is not JSON"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls is not JSON"),
        ({"role": "tool", "content": "t", "tool_calls": [CALL]}, "only the assistant calls tools"),
        ({"role": "assistant", "content": "a", "reasoning_content": 1}, "reasoning_content must be a string"),
    ],
)
def test_a_bad_turn_is_named(tmp_path, turn, message):
    with pytest.raises(UserError, match=rf"messages\[1\].*{message}"):
        read_conversations(write(tmp_path / "c.jsonl", {"messages": [USER, turn]}))
