"""Messages of the user's files, checked and in one form.

A message has a role and a content: text, or a list of {"type": "text", "text": …}. An assistant's may also have

    reasoning_content (or reasoning, thinking)      text before the answer, for templates that have a place for it
    tool_calls                                      as OpenAI's; a call alone needs no content. function_call, OpenAI's
                                                    older key and sharegpt's role, is a call as well
    weight 0, train false or training false         the turn is context and not learned from

and a tool's name and tool_call_id. A null is as if the key were not there.
"""

import json
from typing import Any

from experiments.data.template import Message

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
ROLES |= {"function": "tool"}  # OpenAI's older name
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHAREGPT_ROLES |= {"tool": "tool", "observation": "tool", "function_call": "assistant"}  # whose value is the call
REASONING = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("weight", "train", "training")  # of a turn that is not learned from

Turns = list[tuple[Message, bool]]  # each message, and whether it is learned from if it is the assistant's


def read_turns(turns: Any, name: str, ignored: set[str]) -> Turns:
    """The messages of a list; adds unused keys to `ignored`. Raises ValueError with the reason."""
    if not isinstance(turns, list):
        raise ValueError(f"{name} must be a list, not {kind(turns)}")
    read = []
    for i, turn in enumerate(turns):
        at = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{at} must be an object, not {kind(turn)}")
        sharegpt = name == "conversations" if turn.keys().isdisjoint(("role", "from")) else "role" not in turn
        role_key, text_key, roles = ("from", "value", SHAREGPT_ROLES) if sharegpt else ("role", "content", ROLES)
        role = read_text_of(turn, role_key, at)
        if role not in roles:
            raise ValueError(f"{at}: {role_key} is {role!r}, expected one of {', '.join(roles)}")
        given = {key: value for key, value in turn.items() if value is not None or key == text_key}
        given = _with_calls(given, role == "function_call", text_key, at)
        message, used = _message(roles[role], text_key, given, at)
        if message["role"] != "system" or message["content"]:  # files write "" for no system message
            read.append((message, _learned(given, at)))
        ignored |= {f"{name}[].{key}" for key in given.keys() - {role_key, *used}}
    return read


def _message(role: str, text_key: str, turn: dict, at: str) -> tuple[Message, set[str]]:
    """The message, and the keys it is made of."""
    message, used = {"role": role}, {text_key}
    if role == "assistant":
        used |= {*REASONING, *SWITCHES, "tool_calls"}
        calls = read_list(turn, "tool_calls", at)
        without = bool(calls) and turn.get(text_key) in (None, "")
        message["content"] = "" if without else read_text_of(turn, text_key, at)
        if reason := [key for key in REASONING if turn.get(key, "") != ""]:
            message["reasoning_content"] = read_text_of(turn, reason[0], at)
        if calls:
            message["tool_calls"] = [_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    else:
        if turn.get("tool_calls"):
            raise ValueError(f"{at}: tool_calls of a {role} message: only the assistant calls tools")
        used |= {key for key in SWITCHES if key in turn and not turn[key]} | {"tool_calls"}
        empty = turn.get(text_key) == "" and role in ("system", "tool")
        message["content"] = "" if empty else read_text_of(turn, text_key, at)
        if role == "tool":
            message |= {key: turn[key] for key in ("name", "tool_call_id") if key in turn}
            used |= {"name", "tool_call_id"}
    return message, used


def _with_calls(turn: dict, is_call: bool, text_key: str, at: str) -> dict:
    """The turn with tool_calls in place of sharegpt's function_call turn, or of OpenAI's older function_call."""
    if is_call:
        calls = turn.get(text_key)
        calls = _parsed(calls, f"{at}: {text_key}") if isinstance(calls, str) else calls
        return {**turn, text_key: "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if isinstance(turn.get("function_call"), dict):
        return {key: value for key, value in turn.items() if key != "function_call"} | {
            "tool_calls": [turn["function_call"]]
        }
    return turn


def _call(call: Any, at: str) -> dict:
    """A tool call as transformers has it: arguments are an object."""
    if not isinstance(call, dict):
        raise ValueError(f"{at} must be an object, not {kind(call)}")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise ValueError(f"{at}: function must be an object, not {kind(function)}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{at}: arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{at}: arguments must be an object, not {kind(arguments)}")
    name = read_text_of(function, "name", at)
    more = {"id": call["id"]} if call.get("id") is not None else {}
    return more | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _learned(turn: dict, at: str) -> bool:
    for key in SWITCHES:
        if turn.get(key, 1) not in (0, 1):  # also of false and true
            raise ValueError(f"{at}: {key} must be 0 or 1, false or true, not {turn[key]!r}")
    return all(turn.get(key, 1) for key in SWITCHES)


def read_list(row: dict, key: str, at: str = "") -> list:
    """row[key], a list or a list in JSON; [] if it is not there."""
    value = row.get(key)
    if isinstance(value, str) and value:
        value = _parsed(value, f"{at and at + ': '}{key}")
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        raise ValueError(f"{at and at + ': '}{key} must be a list, not {kind(value)}")
    return value


def read_text_of(row: dict, key: str, at: str = "") -> str:
    """row[key], which must be a string with something in it, or a list of parts that are text."""
    at = at and f"{at}: "
    if key not in row:
        raise ValueError(f"{at}{key} is missing")
    text = row[key]
    if isinstance(text, list) and text and all(isinstance(part, dict) for part in text):
        text = "".join(_text_of_part(part, f"{at}{key}[{i}]") for i, part in enumerate(text))
    if not isinstance(text, str):
        raise ValueError(f"{at}{key} must be a string, not {kind(text)}")
    if not text.strip():
        raise ValueError(f"{at}{key} is empty")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{at}{key} holds half a surrogate pair (\\ud800 to \\udfff), which is not text")
    return text


def _text_of_part(part: dict, at: str) -> str:
    if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise ValueError(f"{at} is of type {part.get('type')!r}: only text parts can be learned from")
    return part["text"]


def _parsed(text: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{at} is not JSON: {getattr(error, 'msg', 'nested too deeply')}") from error


def kind(value: Any) -> str:
    """JSON's word for the type of a value."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")  # other types are Arrow's
