"""Prefix tuning: trainable tokens between the tokens of the text, in the embeddings or in every layer.

    p_1 … p_lp   x_1 … x_(n−1)   i_1 … i_li   x_n   y_1 y_2 …      prompt x, answer y, l_p prefix and l_i infix tokens

    prefix_embed   trains the embeddings of these tokens: l_p + l_i vectors [d].
                   Lester et al. 2021; "prompt tuning" in PEFT
    prefix_layer   trains the inputs of all L layers at these tokens: L·(l_p + l_i) vectors [d]. Li and Liang 2021, §4

Formulas and names are the LoRA paper's (§5.1, PreEmbed and PreLayer). The paper's infix follows the prompt. Here it
precedes the prompt's last token, because the row of that token predicts y_1: if the activations of this row were
replaced, it would predict the same for every prompt. PEFT's prefix tuning trains keys and values, not activations.
`modules/files/baselines.py` converts a prefix_layer without infix to PEFT's form.

A decoder with a prefix replaces the model's own. It takes the tokens of the text and returns only their rows, so
callers see the usual model. Only the cache of keys and values is longer than the text. The positions of the text start
at l_p, and those behind the infix are l_i higher. Padding on the left precedes the prefix and has no positions. So a
prompt gives the same output in a batch as alone, also if attention sees only a window of the last rows.

state_dict keys: `prefix` [l_p + l_i, d] of the decoder (prefix_embed) or of each block (prefix_layer), prefix first.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.adapters.config import AdapterConfig
from modules.adapters.targets import decoder_blocks


class _Layout:
    """The rows of the text's tokens and of the virtual (trainable) tokens in a batch that has both.

    Attributes:
        tokens: int64 [B, T], the rows of the text.
        virtual: int64 [B, l_p + l_i], the rows of the virtual tokens.
    """

    def __init__(self, prefix_tokens: int, infix_tokens: int, starts: Tensor, prompt_lengths: Tensor, length: int):
        """
        Args:
            starts: int64 [B], the column where each text starts, behind its padding on the left.
            prompt_lengths: int64 [B], the column behind the last token of each prompt.
            length: T, the number of columns.
        """
        device, starts = starts.device, starts[:, None]
        self.prefix, self.infix = (torch.arange(tokens, device=device) for tokens in (prefix_tokens, infix_tokens))
        self.last = torch.maximum(prompt_lengths[:, None] - 1, starts)  # the column that the infix precedes [B, 1]
        self.columns = torch.arange(length, device=device)[None]
        shift = prefix_tokens * (self.columns >= starts) + infix_tokens * (self.columns >= self.last)
        self.tokens = self.columns + shift
        self.virtual = torch.cat([starts + self.prefix, self.last + prefix_tokens + self.infix], 1)

    def both(self, of_tokens: Tensor, of_virtual: Tensor) -> Tensor:
        """Combine values of the text [B, T, …] and of virtual tokens [B, l_p + l_i, …] to [B, T + l_p + l_i, …]."""
        batch, rows = len(self.tokens), self.tokens.shape[1] + self.virtual.shape[1]
        empty = of_tokens.new_zeros(batch, rows, *of_tokens.shape[2:])
        return put(put(empty, self.tokens, of_tokens), self.virtual, of_virtual)

    def positions(self, of_tokens: Tensor) -> Tensor:
        """The positions of all rows, int64 [B, T + l_p + l_i].

        Args:
            of_tokens: int64 [B, T], the positions of the text without virtual tokens.
        """
        infix = of_tokens.gather(1, self.last) + len(self.prefix) + self.infix
        prefix = self.prefix.expand(len(of_tokens), -1)
        return self.both(of_tokens + self.tokens - self.columns, torch.cat([prefix, infix], 1))


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy of `x` [B, N, …] in which `values` [B, n, …] replace the rows `rows` [B, n]."""
    return x.index_put((torch.arange(len(rows), device=rows.device)[:, None], rows), values)


@dataclass
class _Shared:
    """State that the decoder passes to its blocks, and `prompt_lengths` to the decoder.

    Attributes:
        virtual: int64 [B, l_p + l_i], the rows of the virtual tokens; None if the cache has them already.
        prompt_lengths: see the function of this name.
    """

    virtual: Tensor | None = None
    prompt_lengths: Tensor | None = None


class _PrefixDecoder:
    """A mixin for the class of the module that holds the blocks. `prefix` is None for prefix_layer."""

    prefix: nn.Parameter | None
    prefix_tokens: int
    infix_tokens: int
    supports_positions: bool  # forward has the argument position_ids; some models' has not
    shared: _Shared

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        **more,
    ):
        """The decoder's own forward, with the virtual tokens added.

        Args:
            input_ids: int64 [B, T], without virtual tokens.
            attention_mask: [B, T], padded on the left or right. With a cache [B, cached tokens of the text + T].

        Raises:
            ValueError: the mask does not have two dimensions.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions: a prefix needs [batch, tokens]")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        (batch, length), extra = x.shape[:2], self.prefix_tokens + self.infix_tokens
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None and attention_mask is None:
            position_ids = torch.arange(length, device=x.device) + max(0, cached - extra)
        elif position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        position_ids = position_ids.expand(batch, -1)
        ones = None if attention_mask is None else attention_mask.new_ones(batch, extra)
        layout = None
        if cached:  # new tokens follow prefix and infix, which follow the padding
            position_ids = position_ids + extra
            attention_mask = None if ones is None else torch.cat([attention_mask, ones], 1)
        else:
            starts = torch.zeros(batch, dtype=torch.int64, device=x.device)
            if attention_mask is not None:
                starts = attention_mask.int().argmax(1)
            prompts = (
                torch.full_like(starts, length) if self.shared.prompt_lengths is None else self.shared.prompt_lengths
            )
            layout = _Layout(self.prefix_tokens, self.infix_tokens, starts, prompts, length)
            position_ids = layout.positions(position_ids)
            attention_mask = None if ones is None else layout.both(attention_mask, ones)
            prefix = x.new_zeros(extra, x.shape[2]) if self.prefix is None else self.prefix.to(x.dtype)
            x = layout.both(x, prefix.expand(batch, -1, -1))
            self.shared.virtual = layout.virtual
        if self.supports_positions:
            more["position_ids"] = position_ids
        try:
            output = super().forward(
                inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values, **more
            )
        finally:
            self.shared.virtual = None
        if layout is not None:
            rows = torch.arange(batch, device=x.device)[:, None]
            output.last_hidden_state = output.last_hidden_state[rows, layout.tokens]
        return output


class _PrefixBlock:
    """A mixin for a block's class. It changes __call__, not forward, which gradient checkpointing calls again later."""

    prefix: nn.Parameter
    shared: _Shared

    def __call__(self, hidden_states: Tensor, *args, **kwargs):
        if (rows := self.shared.virtual) is not None:
            hidden_states = put(hidden_states, rows, self.prefix.to(hidden_states.dtype).expand(len(rows), -1, -1))
        return super().__call__(hidden_states, *args, **kwargs)


@functools.cache
def _mixed(mixin: type, kind: type) -> type:
    return type(f"Prefix{kind.__name__}", (mixin, kind), {})


def _with_prefix(module: nn.Module, mixin: type, prefix: Tensor | None, **more) -> nn.Module:
    """A copy of `module` with a prefix. It shares all parameters and children, also those that are replaced later."""
    clone = copy.copy(module)
    clone.__class__ = _mixed(mixin, type(module))
    clone._parameters = {**module._parameters, "prefix": None if prefix is None else nn.Parameter(prefix.float())}
    vars(clone).update(more)
    return clone


def prefix_modules(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that replace the decoder and, for prefix_layer, its blocks, by full name.

    prefix_embed starts with the embeddings of tokens drawn from the vocabulary (Lester et al. 2021, §3.2). prefix_layer
    starts with the activations of such tokens, read as one text (Li and Liang 2021, §7.4).

    Raises:
        ValueError: the model has no decoder blocks, see `decoder_blocks`, or is a decoder without a head.
    """
    path, blocks = decoder_blocks(model)
    if not path:
        raise ValueError(f"{type(model).__name__} is a decoder by itself: attach the prefix to a model with its head")
    decoder, shared = model.get_submodule(path), _Shared()
    embeddings = decoder.get_input_embeddings()
    tokens = config.prefix_tokens + config.infix_tokens
    ids = torch.randint(embeddings.weight.shape[0], (1, tokens)).to(embeddings.weight.device)
    layers = config.adapter == "prefix_layer"
    start = [None] * len(blocks)
    with torch.no_grad():
        if layers:
            start = _block_inputs(decoder, [model.get_submodule(block) for block in blocks], ids)
        embedded = None if layers else embeddings(ids)[0]
    modules = {
        path: _with_prefix(
            decoder,
            _PrefixDecoder,
            embedded,
            prefix_tokens=config.prefix_tokens,
            infix_tokens=config.infix_tokens,
            supports_positions="position_ids" in inspect.signature(decoder.forward).parameters,
            shared=shared,
        )
    }
    if layers:
        for block, activations in zip(blocks, start):
            modules[block] = _with_prefix(model.get_submodule(block), _PrefixBlock, activations, shared=shared)
    return modules


def _block_inputs(decoder: nn.Module, blocks: list[nn.Module], ids: Tensor) -> list[Tensor]:
    """The input [T, d] of each block when the decoder reads `ids` [1, T]; on the meta device, tensors of that shape."""
    if ids.is_meta:  # transformers' decoders look at values, which meta tensors lack
        return [torch.empty(ids.shape[1], decoder.config.get_text_config().hidden_size, device="meta")] * len(blocks)
    kept: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: kept.append(args[0][0])) for block in blocks]
    training = decoder.training
    try:
        decoder.eval()(input_ids=ids, use_cache=False)
    finally:
        decoder.train(training)
        for hook in hooks:
            hook.remove()
    return kept


def _prefix_decoder(model: nn.Module) -> _PrefixDecoder | None:
    return next((module for module in model.modules() if isinstance(module, _PrefixDecoder)), None)


@contextlib.contextmanager
def prompt_lengths(model: nn.Module, lengths: Tensor | None) -> Iterator[None]:
    """Inside this context, `model` reads texts whose prompts have these lengths. An infix is put at a prompt's end.

    Args:
        lengths: int64 [B], in columns, with the padding on the left. None, as outside the context: the whole text.
    """
    decoder = _prefix_decoder(model)
    if decoder is None:
        yield
        return
    decoder.shared.prompt_lengths = lengths
    try:
        yield
    finally:
        decoder.shared.prompt_lengths = None


def virtual_tokens(model: nn.Module) -> tuple[int, int]:
    """(l_p, l_i) of the active adapter of `model`; (0, 0) if it has no virtual tokens."""
    decoder = _prefix_decoder(model)
    return (0, 0) if decoder is None else (decoder.prefix_tokens, decoder.infix_tokens)
