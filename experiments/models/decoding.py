"""Decoding without a walk through the model's Python code for each token.

One step takes the last token of each row, and chooses the next ones and puts them in its place. Its tensors never move:
keys and values are written into a cache of fixed length (transformers' own static one), and positions, masks, chosen
tokens and the flags of finished rows stay on the device. So a GPU replays the step as a CUDA graph, and the host only
reads tokens, one step late. A CPU runs the same step directly.

Prompts are read eagerly. Shorter ones of a batch are padded on the left. Each row stops at its own end.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from experiments.system.memory import out_of_memory
from experiments.training.graphs import Eager, Graphs

COLUMNS = 64  # the length of a cache is a multiple of this, so that batches of similar lengths share one
PROBE_TOKENS = 9
SHARE = 0.25  # of the change that another first token makes. Rounding, of bf16 too, stays far below it.
_bytes: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()  # of a column, 0: no static cache

Choose = Callable[[Tensor], Tensor]  # from logits [rows, vocabulary] to tokens [rows]


@dataclass(frozen=True)
class Ends:
    """Tokens that end a row, and the token that fills it up then."""

    stops: tuple[int, ...]
    pad: int


class Rows:
    """A batch that is written: its cache, and the tensors of a step.

    Args:
        model: in evaluation mode; one that has `bytes_per_column`.
        batch: rows.
        length: columns of the cache. Prompt and new tokens have to fit.

    Attributes:
        columns: that the cache holds. The last tokens are not among them.
    """

    def __init__(self, model: PreTrainedModel, batch: int, length: int, choose: Choose, ends: Ends):
        self.model, self.choose, self.pad, self.columns = model, choose, ends.pad, 0
        device = model.device
        self.cache = static_cache(model, length)
        self.mask = torch.ones(batch, length, dtype=torch.int64, device=device)  # 0: padding
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # of the last tokens
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # the last ones
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.stops = torch.tensor(ends.stops, dtype=torch.int64, device=device)
        self.graphs = Graphs(device) if device.type == "cuda" else Eager()

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def read(self, prompts: list[list[int]], kept: int = 0) -> None:
        """Read prompts and choose the first new token of each.

        Args:
            kept: of the one prompt, so many tokens are in the cache from before.
        """
        longest, device = max(map(len, prompts)), self.mask.device
        padding = torch.tensor([longest - len(prompt) for prompt in prompts])
        rows = torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        columns = torch.arange(longest)
        self._cut(kept)
        self.mask.fill_(1)
        self.mask[:, :longest] = (columns >= padding[:, None]).to(device)
        positions = (columns - padding[:, None]).clamp(min=0)
        self.done.zero_()
        self._advance(rows[:, kept:].to(device), positions[:, kept:].to(device))
        self.positions.copy_((longest - padding)[:, None])
        self.columns = longest

    def write(self) -> None:
        """Choose the next tokens."""
        self.columns += 1
        self.graphs.run("step", self._step)

    def _step(self) -> None:
        self._advance(self.tokens, self.positions)
        self.positions += 1

    def _advance(self, ids: Tensor, positions: Tensor) -> None:
        logits = _last_logits(self.model, ids, self.mask, positions, self.cache)
        chosen = torch.where(self.done, self.pad, self.choose(logits))
        self.done |= (chosen[:, None] == self.stops).any(1)
        self.tokens.copy_(chosen[:, None])

    def _cut(self, columns: int) -> None:
        """Forget what the cache holds behind so many columns."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(columns)

    def grown(self, length: int) -> "Rows":
        """The same with a longer cache, without a graph."""
        ends = Ends(tuple(self.stops.tolist()), self.pad)
        longer = Rows(self.model, len(self.mask), length, self.choose, ends)
        for old, new in zip(self.cache.layers, longer.cache.layers):
            new.lazy_initialization(old.keys, old.values)
            new.keys[:, :, : old.max_cache_len] = old.keys
            new.values[:, :, : old.max_cache_len] = old.values
        longer.columns = self.columns
        return longer


def written(rows: Rows, count: int) -> Iterator[list[int]]:
    """The tokens that rows get one after another, for each step one a row: at most `count`, until all rows are done.
    A row that is done gets padding."""
    late = int(rows.mask.is_cuda)  # steps that are begun before a token is read
    waiting: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()
    for step in range(count + late):
        if step < count:
            if step:
                rows.write()
            waiting.append(_on_the_way(rows))
        if step >= late:
            tokens, done, arrived = waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield tokens.tolist()
            if done.all():
                return


def _on_the_way(rows: Rows) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
    """Copies of the last tokens and of the flags for the host, and when they are there."""
    if not rows.mask.is_cuda:
        return rows.tokens[:, 0].clone(), rows.done.clone(), None
    tokens = torch.empty(len(rows.tokens), dtype=torch.int64, pin_memory=True)
    done = torch.empty(len(rows.done), dtype=torch.bool, pin_memory=True)
    tokens.copy_(rows.tokens[:, 0], non_blocking=True)
    done.copy_(rows.done, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return tokens, done, arrived


def rounded_up(columns: int) -> int:
    """The length of a cache for so many columns."""
    return -(-columns // COLUMNS) * COLUMNS


def static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """An empty cache. Layers that see a window keep all columns too: the mask hides those before it."""
    cache = StaticCache(model.config, length)
    cache.layers = [StaticLayer(length) if type(layer).is_sliding else layer for layer in cache.layers]
    return cache


def bytes_per_column(model: PreTrainedModel) -> int:
    """Bytes of keys and values that one column of one row takes; 0 if a static cache does not give the model's own
    logits. Found by trying, once a model."""
    if model not in _bytes:
        _bytes[model] = _try_static(model)
    return _bytes[model]


def _try_static(model: PreTrainedModel) -> int:
    """Compare the logits of two rows, the shorter one padded, after reading and after one more step."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (PROBE_TOKENS,), generator=generator).tolist()
    samples, seen = (ids, ids[4:]), []

    def next_one(logits: Tensor) -> Tensor:
        seen.append(logits)
        return torch.full((len(logits),), ids[-1], device=logits.device)

    try:
        rows = Rows(model, 2, COLUMNS, next_one, Ends((), 0))
        if not rows.cache.layers or any(type(layer) is not StaticLayer for layer in rows.cache.layers):
            return 0  # states that are not keys and values
        rows.read([sample[:-1] for sample in samples])
        rows._step()
        whole = [_last_two(model, sample) for sample in samples]
        other = [_last_two(model, [(first + 1) % config.vocab_size, *rest]) for first, *rest in samples]
    except Exception as error:  # code of any model, given arguments that it may not know
        if out_of_memory(error):
            raise
        return 0
    for have, want, changed in zip(torch.stack(seen, 1), whole, other):
        if not (_centred(have) - want).norm() <= SHARE * (changed - want).norm():
            return 0
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in rows.cache.layers) // (2 * COLUMNS)


def _last_two(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Of the last two tokens, without a cache: fp32 [2, vocabulary]."""
    return _centred(model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -2:].float())


def _centred(logits: Tensor) -> Tensor:
    """Without what is common to the whole vocabulary, which changes no probability: most of bf16's rounding is that."""
    return logits - logits.mean(-1, keepdim=True)


def _last_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
    """fp32 [rows, vocabulary] of the last column of ids [rows, columns]."""
    keep = {"logits_to_keep": 1}
    with dense_input_of_head(model):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **keep
        )
    return output.logits[:, -1].float()


@contextlib.contextmanager
def dense_input_of_head(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the output embeddings get a dense copy of the last column's hidden states. Of a view [rows, 1, hidden]
    into all columns, and frozen weights, PyTorch on a CPU makes a product a row with a copy of the weights for each."""
    if (head := model.get_output_embeddings()) is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def chooser(temperature: float, top_p: float, top_k: int) -> Choose:
    """How a step chooses tokens. Temperature 0: the likeliest. Else a draw of torch's generator, among the `top_k`
    likeliest (0: all) and of these among the likeliest that have `top_p` of the probability together."""
    if temperature == 0:
        return _likeliest

    def draw(logits: Tensor) -> Tensor:
        logits = logits / temperature
        if top_k:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
            probabilities = torch.zeros_like(ordered).scatter_(-1, order, ordered)
        # An exponential race: torch.multinomial would wait for the GPU.
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)

    return draw
