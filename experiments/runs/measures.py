"""Measures of a run before and after training, beside its own loss: right answers, and forgetting.

Exact match is the share of held-out prompts to which the model's likeliest (greedy) answer, spaces and reasoning aside,
is the reference: with `data.answer_tokens=N`, which data=arithmetic sets. An answer not ended after N tokens is cut
there.

Forgetting is the loss on a second domain's held-out samples, which no step trains on: `data@second=docstrings`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import Config
from experiments.data.chat import Example
from experiments.data.samples import Data, eval_batches, load_data
from experiments.errors import UserError
from experiments.models.generation import Kept, answer
from experiments.system import parallel
from experiments.system.progress import bar
from experiments.training.evaluation import evaluate
from modules import set_adapter
from modules.adapters.prefix import virtual_tokens
from modules.adapters.state import DEFAULT


class Measures:
    """Takes the measures that `cfg` asks for, perhaps none.

    Raises:
        UserError: the second domain's data cannot be read.
    """

    def __init__(self, cfg: Config, data: Data, tokenizer: PreTrainedTokenizerBase):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.answered = data.heldout if cfg.data.answer_tokens else []
        self.second = []
        if cfg.second.source != "none":
            try:
                self.second = load_data(replace(cfg.second, max_train=1), tokenizer).heldout
            except UserError as error:
                raise UserError(f"data@second={cfg.second.name}, whose keys are second.…: {error}") from error

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """`exact_match`, also of each level as `exact_match_level_1`, and `second_loss` in nats a token."""
        found = exact_match(model, self.tokenizer, self.answered, self.cfg) if self.answered else {}
        if self.second:
            batch_size, pad_id = self.cfg.trainer.eval_batch_size, self.tokenizer.pad_token_id
            found["second_loss"] = evaluate(model, self.second, batch_size, pad_id, bar("second domain")).loss
        return found


@contextlib.contextmanager
def without_prefix(model: PreTrainedModel) -> Iterator[None]:
    """Inside, prefix tokens are off. They start at random: only without them is the untrained model the base."""
    prefix = any(virtual_tokens(model))
    if prefix:
        set_adapter(model, None)
    yield
    if prefix:
        set_adapter(model, DEFAULT)


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], cfg: Config
) -> dict[str, float]:
    """The share of right answers, of all and of each level that the examples have."""
    right: dict[int | None, list[bool]] = {}
    kept = Kept()
    for group in bar("answering")(eval_batches(examples, cfg.trainer.eval_batch_size * parallel.size())):
        own = parallel.share(group)
        prompts = [example.prompt_ids for example in own or group[:1]]  # FSDP needs every process
        answers = answer(model, tokenizer, prompts, cfg.data.answer_tokens, kept=kept)
        for example, text in zip(own, answers):
            right.setdefault(example.level, []).append(_plain(text) == _plain(example.reference))
    levels = sorted({example.level for example in examples if example.level is not None})
    return {"exact_match": _mean([flag for flags in right.values() for flag in flags])} | {
        f"exact_match_level_{level}": _mean(right.get(level, [])) for level in levels
    }


def _plain(text: str) -> str:
    return " ".join(text.split())


def _mean(flags: list[bool]) -> float:
    """The share of flags that are true, over all processes."""
    right, all_of_them = parallel.total(sum(flags), len(flags))
    return right / all_of_them
