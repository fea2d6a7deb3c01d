"""Where samples come from: what this project makes itself, and the user's files."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from experiments.config import DataConfig
from experiments.data import arithmetic, facts, records
from experiments.data.chat import Conversation
from experiments.data.docstrings import docstring_pairs
from experiments.data.paths import files_of
from experiments.data.rows import PLAIN, ROWS, Row, rows_of

TASKS = {  # the system message of data that has one
    "docstrings": "Say in one sentence what the Python function does.",
    "arithmetic": arithmetic.TASK,
    "facts": facts.TASK,
    "records": records.TASK,
}


@dataclass
class Source:
    """Rows that belong together.

    Attributes:
        name: for messages.
        files: where they are; or
        conversations: what they are.
        others: files beside them that are not read.
        weight: of the share of an epoch.
        heldout: whether they are held out, all of them.
    """

    name: str
    files: list[str] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    weight: float | None = None
    heldout: bool = False

    @property
    def bytes(self) -> int:
        try:
            return sum(os.path.getsize(os.path.expanduser(file)) for file in self.files)
        except OSError:  # whoever reads the file says so
            return 0

    def rows(self) -> Iterator[Row]:
        for conversation in self.conversations:
            yield Row(conversation.where, conversation)
        for file in self.files:
            yield from rows_of(file)


def sources_of(cfg: DataConfig) -> list[Source]:
    """The configured sources; those of training come first.

    Raises:
        UserError: no such file.
    """
    if cfg.source == "docstrings":
        return [Source(cfg.name, conversations=_docstring_conversations())]
    if cfg.source == "arithmetic":
        return [Source(cfg.name, conversations=_arithmetic_conversations(cfg.levels or arithmetic.LEVELS))]
    if cfg.source in IN_PARTS:
        parts = {"train": False, cfg.part: True}
        return [
            Source(f"{cfg.name}, {part}", conversations=IN_PARTS[cfg.source](part), heldout=held)
            for part, held in parts.items()
        ]
    endings = PLAIN + ROWS if cfg.source == "text" else ROWS
    training = [(one.path, one.weight) for one in cfg.sources or ()] or [(cfg.path, None)]
    sources = [Source(path, *_files(path, endings), weight=weight) for path, weight in training]
    if cfg.heldout_path and cfg.part == "heldout":
        sources.append(Source(cfg.heldout_path, *_files(cfg.heldout_path, endings), heldout=True))
    return sources


def _files(path: str, endings: tuple[str, ...]) -> tuple[list[str], list[Conversation], list[str]]:
    found, others = files_of(path, endings)
    return found, [], others


def _messages(task: str, question: str, answer: str) -> list[dict]:
    contents = {"system": TASKS[task], "user": question, "assistant": answer}
    return [{"role": role, "content": content} for role, content in contents.items()]


def _docstring_conversations() -> list[Conversation]:
    return [
        Conversation(
            _messages("docstrings", pair.source, pair.summary),
            where=f"{pair.module}:{pair.function}",
            group=pair.module,  # neighbours in a module are alike: train and held-out share none
        )
        for pair in docstring_pairs()
    ]


def _arithmetic_conversations(levels: Iterable[int]) -> list[Conversation]:
    return [
        Conversation(
            _messages("arithmetic", problem.question, str(problem.answer)),
            where=f"arithmetic, level {problem.level}: {problem.question}",
            group=problem.calculation,  # train and held-out share none
            level=problem.level,
        )
        for level in sorted(set(levels))
        for problem in arithmetic.problems(level)
    ]


def _fact_conversations(part: str) -> list[Conversation]:
    return [
        Conversation(_messages("facts", question, fact.answer), where=f"facts: {question}", group=question)
        for fact in facts.facts()
        for question in fact.questions(part)
    ]


def _record_conversations(part: str) -> list[Conversation]:
    return [
        Conversation(_messages("records", record.sentence, record.text), f"records: {record.sentence}", record.sentence)
        for record in records.records(part)
    ]


IN_PARTS = {"facts": _fact_conversations, "records": _record_conversations}  # data that comes in disjoint parts
