"""Conversations to token ids and labels.

A conversation is rendered with the tokenizer's own chat template (template.py) and tokenised once, as a whole, so that
training sees the same tokens as use. Tokens of assistant turns carry labels, all others IGNORED. The token that ends a
turn is labelled (the model must learn to stop), but not the newline after it. Where the template marks with
{% generation %} what the assistant writes, these marks decide.

Some templates render a turn otherwise when more messages follow: they drop its reasoning (Qwen3), or end it by another
token (gpt-oss). There each turn becomes a sample of its own, which ends with it.
"""

from dataclasses import dataclass, replace

import numpy
from transformers import PreTrainedTokenizerBase

from experiments.data.template import Message, OtherwiseInContext, chat_template
from experiments.data.tokens import tokenize

IGNORED = -100  # the label that torch's and transformers' losses skip


@dataclass(frozen=True)
class Conversation:
    """Messages and where they come from.

    Attributes:
        messages: an optional system message, then turns that begin with the user's and include an assistant's.
        where: FILE:LINE or MODULE:FUNCTION, for error messages.
        group: conversations of one group are all for training or all held out.
        level: of difficulty, where the data has levels.
        trained: the positions of the assistant messages to learn from; None: all of them.
        tools: JSON schemas of functions, which the template describes to the model.
    """

    messages: list[Message]
    where: str
    group: str
    level: int | None = None
    trained: tuple[int, ...] | None = None
    tools: list[dict] | None = None

    @property
    def answers(self) -> list[int]:
        """The positions of the assistant messages to learn from."""
        if self.trained is not None:
            return list(self.trained)
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def until(self, i: int) -> "Conversation":
        """The conversation that ends with message `i`, to learn from this one."""
        return replace(self, messages=self.messages[: i + 1], trained=(i,))


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        input_ids: token ids.
        labels: as many: a token's own id where it counts in the loss (models shift labels themselves), else IGNORED.
        prompt_ids: the conversation up to its last assistant turn, to generate from. None for plain text.
        reference: text of that assistant turn. None for plain text.
        level: the conversation's.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int] | None = None
    reference: str | None = None
    level: int | None = None

    def unlabelled(self) -> "Example":
        """The same without labels: for a process that gets no sample of a small batch."""
        return replace(self, labels=[IGNORED] * len(self.labels))


def split(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, train_on: str) -> list[Conversation]:
    """The conversation as samples.

    Args:
        train_on: all: learn from each assistant turn, in one sample if the template renders turns alike wherever they
            are, else each in its own; last: learn from the last one; everything: from every token, in one sample.

    Raises:
        ValueError: the template is not fit for it.
    """
    *_, last = answers = conversation.answers
    if train_on == "everything":
        return [conversation]
    if train_on == "last" or answers == [len(conversation.messages) - 1]:
        return [conversation.until(last)]
    try:
        chat_template(tokenizer).turns(conversation.messages, answers, conversation.tools)
    except OtherwiseInContext:
        return [conversation.until(i) for i in answers]
    return [conversation]


class TooLong(ValueError):
    """A sample has more tokens than it may have."""


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: str,
    train_on: str = "all",
) -> Example | None:
    """Tokenise a conversation and label what is learned from.

    Args:
        conversation: the messages to tokenise, one that `split` gave for `train_on`.
        max_length: tokens the conversation may have.
        too_long: error | drop | truncate: for a longer one.

    Returns:
        The example; None if it is dropped as too long.

    Raises:
        TooLong: it is too long.
        ValueError: it has no label left after truncation, or the chat template is not fit for it.
    """
    template, answers = chat_template(tokenizer), conversation.answers
    text, turns = template.turns(conversation.messages, answers, conversation.tools, alike=train_on != "everything")
    marked = template.marked(conversation.messages, conversation.tools)
    encoded = tokenize(tokenizer, text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], numpy.array(encoded["offset_mapping"])
    if len(ids) > max_length:
        if too_long == "drop":
            return None
        if too_long == "error":
            raise TooLong(
                f"{len(ids)} tokens, but data.max_length is {max_length}: "
                "raise data.max_length, or set data.too_long=drop or data.too_long=truncate"
            )
        ids, offsets = ids[:max_length], offsets[:max_length]

    learned = numpy.zeros(len(ids), bool)
    prompt_ids, reference = None, None
    roles = [message["role"] for message in conversation.messages]
    for i, turn in zip(answers[-len(turns) :], turns):
        written = turn.held(offsets)
        spans = [turn] if marked is None else marked[roles[:i].count("assistant")]
        inside = numpy.any([span.held(offsets) for span in spans], axis=0) if spans else numpy.zeros(len(ids), bool)
        learned |= inside
        if inside.any() and written.any():  # truncation may have cut later turns off
            prompt_ids = ids[: max(inside.argmax(), written.argmax())]
            reference = conversation.messages[i]["content"]
    if prompt_ids is None and train_on != "everything":
        if len(encoded["input_ids"]) == len(ids):
            raise ValueError("the chat template marks no token as the assistant's, so there is nothing to learn from")
        raise ValueError(
            f"none of the first {max_length} tokens is the assistant's: "
            "raise data.max_length, or set data.too_long=drop"
        )
    if train_on == "everything":
        learned = _all_but(conversation, tokenizer, offsets)
    labels = numpy.where(learned, ids, IGNORED).tolist()
    return Example(ids, labels, prompt_ids, reference, conversation.level)


def _all_but(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, offsets: numpy.ndarray) -> numpy.ndarray:
    """Which tokens are not of an assistant turn that is context only."""
    assistant = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    context = [i for i in assistant if i not in conversation.answers]
    if not context:
        return numpy.ones(len(offsets), bool)
    _, turns = chat_template(tokenizer).turns(conversation.messages, context, conversation.tools)
    return ~numpy.any([turn.held(offsets) for turn in turns], axis=0)
