"""Text from a model: batches of prompts with a KV cache, streaming, and how fast it was.

Tokens are decoded one step after another (decoding.py). Three kinds of models take transformers' own loop: those whose
state is not keys and values of each token, those with trained tokens before the text or spread over processes, and
those whose generation_config.json changes how tokens are drawn.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from experiments.data.template import chat_template
from experiments.errors import UserError
from experiments.models import decoding
from experiments.models.sampling import Generated, Sampling
from experiments.system import memory
from modules.adapters.prefix import prompt_lengths, virtual_tokens

_DRAWN = ("temperature", "top_p", "top_k")
_NOT_OF_DRAWING = rf"({'|'.join(_DRAWN)}|do_sample|max_length|max_new_tokens|\w+_token_id|_.*|transformers_version)$"
_NOT_OF_DRAWING += r"|use_cache$|cache_|output_|return_"


class _Clock(BaseStreamer):
    """Notes when the first and the last tokens came, and passes them on to be shown."""

    def __init__(self, show: TextStreamer | None):
        self.show, self.times = show, [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        if self.show is not None:
            self.show.put(value)
        self.times.append(time.perf_counter())  # of the prompt first, which is passed on before it is computed

    def end(self) -> None:
        if self.show is not None:
            self.show.end()


class Kept:
    """A cache from one call of `generate` to the next, for a caller that writes several batches, or a conversation: the
    part of the one prompt that the call before has read or written is not read again. Between the calls the model's
    weights stay where they are."""

    def __init__(self):
        self.rows: decoding.Rows | None = None
        self.written_by: tuple = ()  # the settings of these rows
        self.ids: list[int] = []  # of the one row, the tokens in the cache

    def rows_for(
        self, model: PreTrainedModel, batch: int, columns: int, sampling: Sampling, ends: decoding.Ends
    ) -> decoding.Rows:
        """Rows for so many columns; of a conversation, with what is in its cache."""
        written_by = (model, batch, replace(sampling, max_new_tokens=1), ends)
        length = decoding.rounded_up(columns)
        if self.written_by != written_by or not (batch == 1 or self.rows.length == length):
            _check_room(model, batch, length)
            choose = decoding.chooser(sampling.temperature, sampling.top_p, sampling.top_k)
            self.rows, self.ids = decoding.Rows(model, batch, length, choose, ends), []
        elif self.rows.length < length:
            _check_room(model, batch, 2 * length)
            self.rows = self.rows.grown(2 * length)  # a conversation goes on
        self.written_by = written_by
        return self.rows

    def in_cache(self, prompt: list[int]) -> int:
        """How many tokens at the beginning of `prompt` need not be read."""
        same = next((i for i, (a, b) in enumerate(zip(self.ids, prompt)) if a != b), min(len(self.ids), len(prompt)))
        return min(same, len(prompt) - 1)  # the last one predicts the first new one


def _check_room(model: PreTrainedModel, batch: int, length: int) -> None:
    free, row = memory.free_bytes(model.device), decoding.bytes_per_column(model) * length
    if free is not None and batch * row > free:
        raise UserError(
            f"{batch} rows of {length} tokens take {batch * row / 1e9:.1f} GB of keys and values, and "
            f"{free / 1e9:.1f} GB are free: {free // row} rows fit"
        )


@torch.no_grad()  # not inference_mode, whose tensors FSDP could not train with afterwards
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    stream: bool = False,
    kept: Kept | None = None,
    prompt_length: int | None = None,
    until: Sequence[str] = (),
) -> Generated:
    """Continue prompts, all in one batch.

    Args:
        prompts: token ids, none of them empty.
        stream: print the text as it comes; for one prompt.
        kept: the cache of earlier calls, to go on with.
        prompt_length: so many tokens of each prompt precede the first answer, if the model has infix tokens
            (modules/adapters/prefix.py); by default all.
        until: the batch may end when each answer has ended or holds one of these texts.

    Raises:
        UserError: the batch does not fit in memory.
    """
    training = model.training
    model.eval()
    show = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    try:
        if decodes_in_place(model, sampling):
            return _decode(model, tokenizer, prompts, sampling, show, kept or Kept(), until)
        return _by_transformers(model, tokenizer, prompts, sampling, show, prompt_length)
    finally:
        model.train(training)


@torch.no_grad()
def decodes_in_place(model: PreTrainedModel, sampling: Sampling) -> bool:
    """Whether `generate` decodes with a static cache, on a GPU as a CUDA graph, and not by transformers' loop."""
    if any(virtual_tokens(model)) or getattr(model, "_is_fsdp_managed_module", False):
        return False
    return not (sampling.temperature and own_settings(model)) and decoding.bytes_per_column(model) > 0


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    show: TextStreamer | None,
    kept: Kept,
    until: Sequence[str],
) -> Generated:
    start, longest = time.perf_counter(), max(map(len, prompts))
    stops, first = _stops(model, tokenizer), None
    ends = decoding.Ends(tuple(stops), tokenizer.pad_token_id)
    rows = kept.rows_for(model, len(prompts), longest + sampling.max_new_tokens, sampling, ends)
    cached = kept.in_cache(prompts[0]) if len(prompts) == 1 else 0
    kept.ids = []  # if this is interrupted
    rows.read(prompts, cached)
    steps: list[list[int]] = []
    if show is not None:
        show.put(torch.tensor(prompts))  # which is not shown
    for tokens in decoding.written(rows, sampling.max_new_tokens):
        first = first or time.perf_counter()
        steps.append(tokens)
        if show is not None:
            show.put(torch.tensor(tokens))
        if until and all(_holds(tokenizer, _until(list(row), stops), until, stops) for row in zip(*steps)):
            break
    if show is not None:
        show.end()
    ids = [_until(list(row), stops) for row in zip(*steps)]
    if len(prompts) == 1:
        kept.ids = [*prompts[0], *ids[0]][: rows.columns]
    read = sum(map(len, prompts)) - cached
    return Generated(ids, read, first - start, time.perf_counter() - first)


def _by_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    show: TextStreamer | None,
    prompt_length: int | None,
) -> Generated:
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    stops = _stops(model, tokenizer)
    drawn = {"do_sample": True} | {name: getattr(sampling, name) for name in _DRAWN}
    clock = _Clock(show)
    ends = longest if prompt_length is None else [longest - len(prompt) + prompt_length for prompt in prompts]
    own = contextlib.nullcontext() if sampling.temperature else _without_own_settings(model)
    lengths = torch.tensor(ends, device=model.device).expand(len(prompts))
    with own, prompt_lengths(model, lengths), decoding.dense_input_of_head(model):
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=stops,
            streamer=clock,
            **(drawn if sampling.temperature else {"do_sample": False}),
        )
    ids = [_until(row, stops) for row in output[:, longest:].tolist()]
    start, _, first, *_ = clock.times
    return Generated(ids, sum(map(len, prompts)), first - start, clock.times[-1] - first)


def own_settings(model: PreTrainedModel) -> dict:
    """The settings in generation_config.json that change which tokens are drawn, beside those of `Sampling`."""
    settings = model.generation_config.to_diff_dict()
    return {name: value for name, value in settings.items() if not re.match(_NOT_OF_DRAWING, name)}


@contextlib.contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has no generation settings of its own, which transformers would add to those it is given."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, those that chat models name besides, and the one by which the
    chat template ends a turn, which base models do not name."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    if tokenizer.is_fast and tokenizer.chat_template:
        more = [*more, chat_template(tokenizer).stop]
    return sorted({token for token in (tokenizer.eos_token_id, *more) if token is not None})


def _until(ids: list[int], stops: list[int]) -> list[int]:
    """`ids` up to and with the first of `stops`; padding follows it."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def _holds(tokenizer: PreTrainedTokenizerBase, ids: list[int], texts: Sequence[str], stops: list[int]) -> bool:
    """Whether an answer has ended or holds one of the texts."""
    written = tokenizer.decode(ids)
    return ids[-1] in stops or any(text in written for text in texts)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    reasoning: bool = False,
    kept: Kept | None = None,
) -> list[str]:
    """The model's likeliest (greedy) answer to each prompt, all in one batch, as text.

    Args:
        reasoning: with all that the model writes before the answer itself, such as a <think> block.
        kept: see `generate`.
    """
    generated = generate(model, tokenizer, prompts, Sampling(max_new_tokens), kept=kept)
    return [decode(tokenizer, ids if reasoning else without_reasoning(tokenizer, ids)) for ids in generated.ids]


def without_reasoning(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The tokens behind a <think> block or the name of a channel, if the chat template has such."""
    opens = chat_template(tokenizer).opens if tokenizer.is_fast and tokenizer.chat_template else None
    last = max((i for i, token in enumerate(ids) if token == opens), default=-1)
    return ids[last + 1 :]
