"""Conversations to token ids and labels.

A conversation is rendered with the tokenizer's own chat template and tokenised once, as a whole, so that training sees
the same tokens as use. The characters of an assistant turn are found by rendering the conversation's beginnings. Tokens
inside them carry labels, all others IGNORED. A turn ends with the template's end-of-turn token, which is labelled (the
model must learn to stop), but not with the newline after it.
"""

from dataclasses import dataclass, replace

import jinja2
from transformers import PreTrainedTokenizerBase

from experiments.errors import UserError

IGNORED = -100  # the label that torch's and transformers' losses skip
Message = dict[str, str]  # {"role": system | user | assistant, "content": …}


@dataclass(frozen=True)
class Conversation:
    """Messages and where they come from.

    Attributes:
        messages: an optional system message, then turns that begin with the user's and include an assistant's.
        where: FILE:LINE or MODULE:FUNCTION, for error messages.
        group: conversations of one group are all for training or all held out.
        level: of difficulty, where the data has levels.
    """

    messages: list[Message]
    where: str
    group: str
    level: int | None = None


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


@dataclass(frozen=True)
class _Turn:
    """An assistant turn in rendered text: its first character, one past its last, and its content."""

    start: int
    end: int
    content: str

    def holds(self, offset: tuple[int, int]) -> bool:
        """True if the token is inside. A token of spaces may have an empty offset, at its end."""
        return self.start <= offset[0] and self.start < offset[1] <= self.end


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless conversations can be encoded with this tokenizer."""
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: chat data needs a fast tokenizer (one with a tokenizer.json)")
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template: use a chat model or data=text")


def encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int, too_long: str
) -> Example | None:
    """Tokenise a conversation and label its assistant turns.

    Args:
        conversation: the messages to tokenise.
        tokenizer: one that `check_tokenizer` accepts.
        max_length: tokens the conversation may have.
        too_long: error | drop | truncate: for a longer one.

    Returns:
        The example; None if it is dropped as too long.

    Raises:
        UserError: it is too long, or has no label left after truncation, or the template is not fit for it.
    """
    text, turns = _render(conversation, tokenizer)
    encoded = tokenize(tokenizer, text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(ids) > max_length:
        if too_long == "drop":
            return None
        if too_long == "error":
            raise UserError(
                f"{conversation.where}: {len(ids)} tokens, but data.max_length is {max_length}: "
                "raise data.max_length, or set data.too_long=drop or data.too_long=truncate"
            )
        ids, offsets = ids[:max_length], offsets[:max_length]

    labels = [IGNORED] * len(ids)
    prompt_ids, reference = None, None
    for turn in turns:
        inside = [i for i, offset in enumerate(offsets) if turn.holds(offset)]
        for i in inside:
            labels[i] = ids[i]
        if inside:  # truncation may have cut later turns off
            prompt_ids, reference = ids[: inside[0]], turn.content
    if prompt_ids is None:
        raise UserError(
            f"{conversation.where}: none of the first {max_length} tokens is the assistant's: "
            "raise data.max_length, or set data.too_long=drop"
        )
    return Example(ids, labels, prompt_ids, reference, conversation.level)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **kwargs):
    """Token ids of text as it is: no special tokens are added, and no length is warned of."""
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **kwargs)


def _render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[_Turn]]:
    """The conversation as text and its assistant turns in it."""
    messages, where = conversation.messages, conversation.where

    def render(count: int, add_generation_prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the tokenizer's chat template refuses this conversation: {error}") from error

    text = render(len(messages))
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(i, add_generation_prompt=True)
            until = render(i + 1).rstrip()  # without the newline after the end-of-turn token
            if not (text.startswith(until) and until.startswith(before)):
                raise UserError(
                    f"{where}: the tokenizer's chat template renders message {i + 1} differently when more follow, "
                    "so assistant tokens cannot be told apart: use single-turn conversations or another tokenizer"
                )
            turns.append(_Turn(len(before), len(until), message["content"]))
    return text, turns
