"""Conversations, files of them and their configuration, for the tests of data."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from experiments.config import DataConfig
from experiments.data.chat import IGNORED, Conversation, Example
from experiments.data.paths import files_of
from experiments.data.rows import ROWS, rows_of
from experiments.data.user_files import conversation_of
from experiments.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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


def read_conversations(path: str) -> tuple[list[Conversation], set[str]]:
    """The conversations of the files that a path means, and the keys that no format uses."""
    found, ignored = [], set()
    for file in files_of(path, ROWS)[0]:
        for row in rows_of(file):
            try:
                found.append(conversation_of(row, ignored))
            except ValueError as error:
                raise UserError(f"{row.where}: {error}") from error
    return found, ignored
