"""The user's files: conversations in four formats, and plain text.

A file of conversations has one JSON object a line (JSON Lines), or is one JSON array of them. An object has one of
these formats; all become the same messages:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}      (sharegpt)
    {"instruction": "…", "input": "…", "output": "…"}                                        (alpaca; input optional)
    {"prompt": "…", "completion": "…"}                                                       (or two lists of messages)

messages.py says what a message may have. Beside them, `system` is a leading system message, `tools` describes
functions, and alpaca's `history` is earlier turns. A null is as if the key were not there. Nothing is repaired or
skipped: any other object is an error that names the file and the line. Other keys are left out, and the caller is told
which.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.data.chat import Conversation
from experiments.data.messages import Turns, kind, read_list, read_text_of, read_turns
from experiments.data.template import Message
from experiments.errors import UserError

FORMATS = "messages, conversations (sharegpt), instruction + output (alpaca) or prompt + completion"
ENCODINGS = {  # by the marks that files begin with; the longer ones first
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_text(path: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        UserError: no such file, an empty one, or bytes that are not text.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read this file: {error.strerror}") from error
    mark = next((mark for mark in ENCODINGS if data.startswith(mark)), b"")
    encoding, data = ENCODINGS.get(mark, "utf-8"), data.removeprefix(mark)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="replace").count("\n") + 1
        at = len(mark) + error.start
        raise UserError(f"{path}:{line}: not {encoding.upper()} at byte {at}: save the file as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{path}:{line}: a zero byte, so this is not text in {encoding.upper()}: save the file as UTF-8"
        )
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def read_conversations(path: str) -> tuple[list[Conversation], set[str]]:
    """Read a file of conversations. Those with the same messages form a group; empty lines are skipped.

    Returns:
        The conversations in the file's order, and the keys that no format uses.

    Raises:
        UserError: the file cannot be read, or an object is not a conversation; the message begins `FILE:LINE:`.
    """
    conversations: list[Conversation] = []
    ignored: set[str] = set()
    for line, row in _rows(path):
        where = f"{path}:{line}"
        try:
            conversations.append(_conversation(row, where, ignored))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    if not conversations:
        raise UserError(f"{path}: no conversation in this file")
    return conversations, ignored


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file, each with the line on which it begins."""
    text, line = read_text(path), 1
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    try:
        if text.lstrip().startswith("["):
            yield from _elements(text, decoder)
            return
        for line, written in enumerate(text.split("\n"), start=1):  # JSON text may hold other line separators
            if written.strip():
                yield line, decoder.decode(written)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise UserError(f"{path}:{line}: not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}:{line}: lists or objects in one another, deeper than JSON is read") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a value in JSON: write null")


def _elements(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON array, each with its line."""
    at, line = text.index("[") + 1, 1
    counted = 0
    while True:
        at = _behind_blanks(text, at)
        if text[at : at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        value, at = decoder.raw_decode(text, at)
        yield line, value
        at = _behind_blanks(text, at)
        if text[at : at + 1] not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at += text[at] == ","
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, _behind_blanks(text, at + 1))


def _behind_blanks(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


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
        group=json.dumps(messages),
        trained=None if len(trained) == len(answers) else trained,
        tools=read_list(row, "tools") or None,
    )


def _turns(row: dict, ignored: set[str]) -> tuple[Turns, set[str]]:
    """The turns of an object, and the keys they are made of."""
    for name in ("messages", "conversations"):
        if name in row:
            return read_turns(row[name], name, ignored), {name}
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
    raise ValueError(f"unknown format with keys {', '.join(map(repr, row)) or 'none'}: expected {FORMATS}")


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
