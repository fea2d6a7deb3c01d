"""A tokenizer's chat template: the text that it makes of messages, and which part of it an assistant turn is.

A template is a program that says neither where a turn begins nor how it ends. Both are found by rendering:

    start   behind the generation prompt; before the first token of that prompt that the turn goes on without
            (DeepSeek-V3's opens a <think> that the template never renders)
    end     behind the added token that follows the content, the end token. A template without one (GLM-4-MoE) ends a
            turn by the token of the next role; one without that too, by the tokenizer's EOS

A template that marks what the assistant writes ({% generation %}) is asked for these spans instead.
"""

import contextlib
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import jinja2
from numpy import ndarray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from experiments.data.rendering import limited
from experiments.data.tokens import tokenize
from experiments.errors import UserError

Message = dict[str, Any]  # role and content; an assistant's reasoning_content and tool_calls, as transformers has them
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION, REASON, ANSWER = "lorem", "ipsum", "dolor"  # of conversations that a template is tried on
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError)  # a template's code raises any,
REFUSALS += (ArithmeticError, MemoryError, RecursionError)  # and a stranger's may mean harm


@dataclass(frozen=True)
class Turn:
    """An assistant turn in rendered text: its first character and one past its last, end token included."""

    start: int
    end: int

    def held(self, offsets: ndarray) -> ndarray:
        """Which tokens, of offsets [n, 2], begin inside: an end token may swallow the blanks behind it. A token of
        spaces may have an empty offset, at its end."""
        begins, ends = offsets.T
        return (self.start <= begins) & (self.start < ends) & ((begins < self.end) | (ends <= self.end))


@dataclass(frozen=True)
class _Ending:
    """How turns end.

    Attributes:
        tail: the text behind the content of a last turn.
        closing: the text from the end of the content to that of the end token.
        stop: the end token.
        own: whether the template closes a last turn itself.
    """

    tail: str
    closing: str
    stop: int | None
    own: bool


class OtherwiseInContext(ValueError):
    """A template renders a turn differently when more messages follow."""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
    """The template of a tokenizer.

    Raises:
        UserError: it has none, or does not tell the place of its tokens.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: chat data needs a fast tokenizer (one with a tokenizer.json)")
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template: use a chat model or data=text")
    options = getattr(tokenizer, "chat_template_kwargs", {})
    return _chat_template(tokenizer, str(tokenizer.chat_template), json.dumps(options, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _chat_template(tokenizer: PreTrainedTokenizerBase, source: str, options: str) -> "ChatTemplate":
    return ChatTemplate(tokenizer, json.loads(options))


class ChatTemplate:
    """Renders messages. Methods raise ValueError, with the reason, for messages that the template is not fit for.

    Args:
        options: what the template takes beside messages and tools, such as {"enable_thinking": False}.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, options or {}
        self.added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}

    def render(self, messages: list[Message], tools: list | None = None, prompt: bool = False) -> str:
        """The text of the messages; with `prompt` up to where the assistant begins to write."""
        return self._apply(self._content(messages), tools, prompt)

    def generation_prompt(self, messages: list[Message]) -> str:
        """The text to generate an answer from, as training has it before the answers that it labels."""
        prompt = self.render(messages, prompt=True)
        return prompt[: self._start(messages, None, self.render([*messages, _assistant(ANSWER)]))]

    def last_turn(self, messages: list[Message], tools: list | None = None) -> tuple[str, Turn]:
        """The text of messages of which the last is the assistant's, and this turn in it."""
        text = self.render(messages, tools)
        start, ending = self._start(messages[:-1], tools, text), self._ending
        if messages[-1].get("tool_calls"):
            text, end = self._closed_call(messages, tools, text)
        elif not text.endswith(ending.tail):
            end = len(text.rstrip())
        else:
            content_end = len(text) - len(ending.tail)
            end = content_end + len(ending.closing)
            text = text if ending.own else text[:content_end] + ending.closing
        self._check_nothing_is_left_out(messages, tools, text, text[start:end])
        return text, Turn(start, end)

    def turns(
        self, messages: list[Message], trained: list[int], tools: list | None = None, alike: bool = True
    ) -> tuple[str, list[Turn]]:
        """The text of messages, and in it the turns at the positions `trained`.

        Args:
            alike: every turn has to be rendered as it is when nothing follows; if not, only the last one has to.

        Raises:
            OtherwiseInContext: one of them is rendered differently because of the messages that follow.
        """
        trained = trained if alike else trained[-1:]
        lasts = [self.last_turn(messages[: i + 1], tools) for i in trained]
        text = lasts[-1][0] if trained[-1] == len(messages) - 1 else self.render(messages, tools)
        for i, (until, turn) in zip(trained, lasts):
            if not text.startswith(until[: turn.end]):
                raise OtherwiseInContext(f"the chat template renders message {i + 1} differently when more follow")
        return text, [turn for _, turn in lasts]

    def marked(self, messages: list[Message], tools: list | None = None) -> list[list[Turn]] | None:
        """Of each assistant message the spans that the template marks as generated; None: it marks none."""
        source = self.tokenizer.get_chat_template(None, tools)
        if not MARKER.search(source):
            return None
        options = {"chat_template": source, "return_assistant_tokens_mask": True}
        options = self.tokenizer.special_tokens_map | self.options | options
        with limited():
            [text], [spans] = render_jinja_template([self._content(messages)], tools, **options)
        prompts = [self.render(messages[:i], tools, True) for i, m in enumerate(messages) if m["role"] == "assistant"]
        starts = [_shared(prompt, text) for prompt in prompts]
        owned = [[] for _ in starts]
        for start, end in spans:
            owned[max((i for i, begin in enumerate(starts) if begin < end), default=0)].append(Turn(start, end))
        return owned

    @property
    def stop(self) -> int | None:
        """The token that ends an answer."""
        return self._ending.stop

    @functools.cached_property
    def opens(self) -> int | None:
        """The last added token before an answer's own text: </think>, or <|message|> after a channel's name."""
        text = self.render([*self._first, _assistant(ANSWER) | {"reasoning_content": REASON}])
        head = text[self._start(self._first, None, text) : text.rindex(ANSWER)]
        added = [token for token in tokenize(self.tokenizer, head)["input_ids"] if token in self.added]
        return added[-1] if added else None

    @functools.cached_property
    def _tried(self) -> tuple[list[Message], bool]:
        """The messages before an answer in conversations that the template is tried on: it may ask for a system's
        first. And whether it reads content as a list of parts and not as text, as image-text models' do."""
        for parts in (False, True):
            for first in ([_user()], [{"role": "system", "content": QUESTION}, _user()]):
                messages = [*first, _assistant(ANSWER)]
                with contextlib.suppress(ValueError):
                    if ANSWER in self._apply(_as_parts(messages) if parts else messages):
                        return first, parts
        return [_user()], False

    @property
    def _first(self) -> list[Message]:
        return self._tried[0]

    @functools.cached_property
    def _ending(self) -> _Ending:
        tail = self.render([*self._first, _assistant(ANSWER)]).rpartition(ANSWER)[2]
        rest = self.render([*self._first, _assistant(ANSWER), _user()]).rpartition(ANSWER)[2]
        if end := self._end_token(tail[: _shared(tail, rest)]) or self._end_token(tail):
            return _Ending(tail, tail[: end[1]], end[0], own=True)
        if (end := self._end_token(rest)) and not rest[: end[1]].removesuffix(self._name(end[0])).strip():
            return _Ending(tail, rest[: end[1]], end[0], own=False)
        return _Ending(tail, self.tokenizer.eos_token or "", self.tokenizer.eos_token_id, own=False)

    def _apply(self, messages: list[Message], tools: list | None = None, prompt: bool = False) -> str:
        try:
            with limited():
                return self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self.options
                )
        except REFUSALS as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer's chat template refuses this conversation: {reason}") from error

    def _content(self, messages: list[Message]) -> list[Message]:
        return _as_parts(messages) if self._tried[1] else messages

    def _closed_call(self, messages: list[Message], tools: list | None, text: str) -> tuple[str, int]:
        """The text of messages of which the last calls tools, closed by an end token, and where that ends."""
        body = text.rstrip()
        if tokenize(self.tokenizer, body)["input_ids"][-1] in self.added:
            return text, len(body)
        rest = self.render([*messages, {"role": "tool", "content": ANSWER}], tools)[len(body) :]
        end = self._end_token(rest.partition(ANSWER)[0])
        closed = body + (rest[: end[1]] if end else self._ending.closing)
        return closed, len(closed)

    def _end_token(self, text: str) -> tuple[int, int] | None:
        """The first added token in a text, or the last of several without a blank between, and where it ends, without
        the blanks that it may swallow."""
        encoded = tokenize(self.tokenizer, text, return_offsets_mapping=True)
        found = None
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"]):
            if token in self.added and (found is None or start == found[1]):
                found = token, text.index(self._name(token), start) + len(self._name(token))
            elif found:
                break
        return found

    def _name(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token)

    def _start(self, earlier: list[Message], tools: list | None, text: str) -> int:
        """Where the turn after `earlier` begins in `text`."""
        prompt = self.render(earlier, tools, prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        begins = [begin for begin, _ in tokenize(self.tokenizer, prompt, return_offsets_mapping=True)["offset_mapping"]]

        def shared(other: str) -> int:
            """The length of the whole tokens of the prompt that another text begins with."""
            return max((begin for begin in begins if begin <= _shared(prompt, other)), default=0)

        if shared(text) < shared(self.render(earlier, tools)):
            raise ValueError(
                f"the tokenizer's chat template renders message {len(earlier) + 1} differently from the generation "
                "prompt before it: use another chat template"
            )
        return shared(text)

    def _check_nothing_is_left_out(self, messages: list[Message], tools: list | None, text: str, turn: str) -> None:
        """Raise ValueError if the template drops a part of the last message, or of what it answers."""
        whole, own = _squeezed(text), _squeezed(turn)
        for i, message in enumerate(messages, start=1):
            content = message["content"]
            as_json = json.dumps(content, ensure_ascii=False)[1:-1]  # as Llama 3.1 has results of tools
            if message["role"] != "assistant" and not any(_squeezed(c) in whole for c in (content, as_json)):
                raise ValueError(f"the tokenizer's chat template leaves out message {i}, the {message['role']}'s")
        if tools and self.render(messages) == self.render(messages, tools):
            raise ValueError("the tokenizer's chat template leaves out the tools: use one that describes them")
        i, message = len(messages), messages[-1]
        for key in ("content", "reasoning_content"):
            if _squeezed(message.get(key, "")) not in own:
                part = "the text before </think>" if "</think>" in message[key] else key
                raise ValueError(f"the tokenizer's chat template leaves out {part} of message {i}: remove it")
        for call in message.get("tool_calls", ()):
            if not re.search(rf"\b{re.escape(call['function']['name'])}\b", turn):
                raise ValueError(f"the tokenizer's chat template leaves out tool_calls of message {i}: remove them")


def _user() -> Message:
    return {"role": "user", "content": QUESTION}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _as_parts(messages: list[Message]) -> list[Message]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _shared(one: str, other: str) -> int:
    """The length of the beginning that two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _squeezed(text: str) -> str:
    """The text without blanks: templates trim and add some."""
    return "".join(text.split())
