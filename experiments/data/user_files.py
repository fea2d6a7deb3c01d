"""The user's conversations, in four formats that all become the same messages.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}      (sharegpt)
    {"instruction": "…", "input": "…", "output": "…"}                                        (alpaca; input optional)
    {"prompt": "…", "completion": "…"}                                                       (or two lists of messages)

A row of a file (rows.py) has one of them; a file may mix them. messages.py says what a message may have. Beside them,
`system` is a leading system message, `tools` describes functions, and alpaca's `history` is earlier turns. A null is as
if the key were not there, and where a list is expected, text may hold it as JSON (CSV has nothing else). Nothing is
repaired: any other row is an error, unless data.bad=skip leaves it out. Other keys are left out, and the caller is told
which.
"""

import json
from typing import Any

from experiments.data.chat import Conversation
from experiments.data.messages import Turns, kind, read_list, read_text_of, read_turns
from experiments.data.rows import Row
from experiments.data.template import Message

FORMATS = {  # the keys that each must have
    "messages": ("messages",),
    "conversations (sharegpt)": ("conversations",),
    "instruction + output (alpaca)": ("instruction", "output"),
    "prompt + completion": ("prompt", "completion"),
}


def conversation_of(row: Row, ignored: set[str]) -> Conversation:
    """The conversation of a row in any of the formats; adds unused keys to `ignored`. Those with the same messages form
    a group. Raises ValueError with the reason if it is none."""
    return _conversation(row.read(), row.where, ignored)


def _conversation(row: Any, where: str, ignored: set[str]) -> Conversation:
    """The conversation of an object in any of the formats; adds unused keys to `ignored`."""
    if not isinstance(row, dict):
        raise ValueError(f"a line must hold a JSON object, not {kind(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    turns, used = _turns(row, ignored)
    if row.get("system", "") != "":
        if turns and turns[0][0]["role"] == "system":
            raise ValueError("a system key beside a system message: keep one of them")
        turns.insert(0, ({"role": "system", "content": read_text_of(row, "system")}, False))
    ignored |= row.keys() - used - {"system", "tools"}
    messages = [message for message, _ in turns]
    _check_turns(messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = tuple(i for i in answers if turns[i][1])
    if not trained:
        raise ValueError("no assistant turn is to be learned from: each has weight 0 or train false")
    return Conversation(
        messages,
        where,
        group=json.dumps(messages, default=str),
        trained=None if len(trained) == len(answers) else trained,
        tools=read_list(row, "tools") or None,
    )


def _turns(row: dict, ignored: set[str]) -> tuple[Turns, set[str]]:
    """The turns of an object, and the keys they are made of."""
    for name in ("messages", "conversations"):
        if name in row:
            listed = read_list(row, name) if _is_listed(row[name]) else row[name]
            return read_turns(listed, name, ignored), {name}
    if {"instruction", "output"} <= row.keys():
        question = read_text_of(row, "instruction")
        if row.get("input", "") != "":  # alpaca files write "" for no input
            question += "\n\n" + read_text_of(row, "input")
        turns = [*_history(row), *_single_turn(question, read_text_of(row, "output"))]
        return turns, {"instruction", "input", "output", "history"}
    if {"prompt", "completion"} <= row.keys():
        used = {"prompt", "completion"}
        if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
            prompt, completion = (read_turns(row[name], name, ignored) for name in ("prompt", "completion"))
            return [(message, False) for message, _ in prompt] + completion, used
        return _single_turn(read_text_of(row, "prompt"), read_text_of(row, "completion")), used
    raise ValueError(_unknown(row))


def _is_listed(value: Any) -> bool:
    """Whether text holds a list."""
    return isinstance(value, str) and value.lstrip().startswith("[")


def _unknown(row: dict) -> str:
    *others, last = FORMATS
    message = f"unknown format with keys {', '.join(map(repr, row)) or 'none'}: expected {', '.join(others)} or {last}"
    for needed in FORMATS.values():
        if missing := [key for key in needed if key not in row and not row.keys().isdisjoint(needed)]:
            return f"{message}; {missing[0]} is missing"
    return f"{message}; for plain text use data=text" if "text" in row else message


def _history(row: dict) -> Turns:
    turns = []
    for i, pair in enumerate(read_list(row, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{i}] must be a list of a question and its answer")
        said = dict(zip(("question", "answer"), pair))
        turns += _single_turn(*(read_text_of(said, name, f"history[{i}]") for name in said))
    return turns


def _single_turn(question: str, answer: str) -> Turns:
    return [({"role": "user", "content": question}, False), ({"role": "assistant", "content": answer}, True)]


def _check_turns(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("a system message must come first")
    if "assistant" not in roles:
        raise ValueError("the conversation has no assistant turn, so there is nothing to learn from it")
    if roles[roles[0] == "system"] != "user":
        raise ValueError("the conversation must begin with a user turn, after an optional system message")
