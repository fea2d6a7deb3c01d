"""The user's files: JSON Lines of conversations in four formats, and plain text.

A line of a .jsonl file is one JSON object in one of these formats; all become the same messages:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}      (sharegpt)
    {"instruction": "…", "input": "…", "output": "…"}                                        (alpaca; input optional)
    {"prompt": "…", "completion": "…"}

Nothing is repaired or skipped: any other line is an error that names the file and the line. Other keys
beside a format's own are left out, and the caller is told which.
"""

import json
from pathlib import Path
from typing import Any

from experiments.data.chat import Conversation, Message
from experiments.errors import UserError

SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
FORMATS = "messages, conversations (sharegpt), instruction + output (alpaca) or prompt + completion"


def read_text(path: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        UserError: no such file, an empty one, or bytes that are not UTF-8.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read this file: {error.strerror}") from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 at byte {error.start}: save the file as UTF-8") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def read_conversations(path: str) -> tuple[list[Conversation], set[str]]:
    """Read a .jsonl file. Lines with the same messages form a group; empty lines are skipped.

    Returns:
        The conversations in the file's order, and the keys that no format uses.

    Raises:
        UserError: the file cannot be read, or a line is not a conversation; the message begins `FILE:LINE:`.
    """
    conversations: list[Conversation] = []
    ignored: set[str] = set()
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # JSON text may hold other line separators
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            messages = _messages(json.loads(line), ignored)
            _check_turns(messages)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        conversations.append(Conversation(messages, where, group=json.dumps(messages)))
    return conversations, ignored


def _messages(row: Any, ignored: set[str]) -> list[Message]:
    """Messages of one line in any of the formats; adds unused keys to `ignored`. Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError(f"a line must hold a JSON object, not {_kind(row)}")
    if "messages" in row:
        used = {"messages"}
        messages = _turns(row["messages"], "messages", "role", "content", ROLES, ignored)
    elif "conversations" in row:
        used = {"conversations"}
        messages = _turns(row["conversations"], "conversations", "from", "value", SHAREGPT_ROLES, ignored)
    elif {"instruction", "output"} <= row.keys():
        used = {"instruction", "input", "output"}
        question = _text(row, "instruction")
        if row.get("input", "") != "":  # alpaca files write "" for no input
            question += "\n\n" + _text(row, "input")
        messages = _single_turn(question, _text(row, "output"))
    elif {"prompt", "completion"} <= row.keys():
        used = {"prompt", "completion"}
        messages = _single_turn(_text(row, "prompt"), _text(row, "completion"))
    else:
        raise ValueError(f"unknown format with keys {', '.join(map(repr, row)) or 'none'}: expected {FORMATS}")
    ignored |= row.keys() - used
    return messages


def _turns(
    turns: Any, name: str, role_key: str, text_key: str, roles: dict[str, str], ignored: set[str]
) -> list[Message]:
    """A list of {role_key: …, text_key: …} as messages."""
    if not isinstance(turns, list):
        raise ValueError(f"{name} must be a list, not {_kind(turns)}")
    messages = []
    for i, turn in enumerate(turns):
        at = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{at} must be an object, not {_kind(turn)}")
        role = _text(turn, role_key, at)
        if role not in roles:
            raise ValueError(f"{at}: {role_key} is {role!r}, expected one of {', '.join(roles)}")
        messages.append({"role": roles[role], "content": _text(turn, text_key, at)})
        ignored |= {f"{name}[].{key}" for key in turn.keys() - {role_key, text_key}}
    return messages


def _single_turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: dict, key: str, at: str = "") -> str:
    """row[key], which must be a string with something in it."""
    at = at and f"{at}: "
    if key not in row:
        raise ValueError(f"{at}{key} is missing")
    text = row[key]
    if not isinstance(text, str):
        raise ValueError(f"{at}{key} must be a string, not {_kind(text)}")
    if not text.strip():
        raise ValueError(f"{at}{key} is empty")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{at}{key} holds half a surrogate pair (\\ud800 to \\udfff), which is not text")
    return text


def _check_turns(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("a system message must come first")
    if "assistant" not in roles:
        raise ValueError("the conversation has no assistant turn, so there is nothing to learn from it")
    if roles[roles[0] == "system"] != "user":
        raise ValueError("the conversation must begin with a user turn, after an optional system message")


def _kind(value: Any) -> str:
    """JSON's word for the type of a value."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
