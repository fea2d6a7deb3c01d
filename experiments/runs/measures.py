"""Measures of a run before and after training, beside its own loss: right answers, and forgetting.

Exact match is the share of held-out prompts to which the model's likeliest (greedy) answer, spaces and reasoning aside,
is the reference: with `data.answer_tokens=N`, which data=arithmetic sets. An answer not ended after N tokens is cut
there. With data=records it is the share of answers that are the right data, whatever their spaces and order of keys;
`valid` is the share that a parser accepts.

Forgetting is the loss on a second domain's held-out samples, which no step trains on: `data@second=docstrings`.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import Config
from experiments.data import records
from experiments.data.chat import Example
from experiments.data.samples import Data, eval_batches, load_data
from experiments.errors import UserError
from experiments.models.generation import Kept, answer
from experiments.system import parallel
from experiments.system.progress import bar
from experiments.training.evaluation import SampleLoss, evaluate_each
from modules import set_adapter
from modules.adapters.prefix import virtual_tokens
from modules.adapters.state import DEFAULT


@dataclass
class Measured:
    """Measures of a model.

    Attributes:
        numbers: `exact_match`, also of each level as `exact_match_level_1`; `valid`; `second_loss` in nats a token.
        flags: `exact_match` and `valid` of the answer to each held-out sample, in process 0.
        second: the loss of each sample of the second domain, likewise.
    """

    numbers: dict[str, float]
    flags: dict[str, list[bool]] = field(default_factory=dict)
    second: list[SampleLoss] = field(default_factory=list)


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

    def measure(self, model: PreTrainedModel) -> Measured:
        found = right_answers(model, self.tokenizer, self.answered, self.cfg) if self.answered else Measured({})
        if self.second:
            batch_size, pad_id = self.cfg.trainer.eval_batch_size, self.tokenizer.pad_token_id
            evaluation, found.second = evaluate_each(model, self.second, batch_size, pad_id, bar("second domain"))
            found.numbers["second_loss"] = evaluation.loss
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


def right_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], cfg: Config
) -> Measured:
    """The shares of right and of valid answers, of all and of each level that the examples have."""
    found: list[tuple[int, dict[str, bool]]] = []
    kept = Kept()
    batches = eval_batches(examples, cfg.trainer.eval_batch_size * parallel.size())
    for group, places in zip(bar("answering")(batches), batches.places):
        own = parallel.share(group)
        prompts = [example.prompt_ids for example in own or group[:1]]  # FSDP needs every process
        answers = answer(model, tokenizer, prompts, cfg.data.answer_tokens, kept=kept)
        judged = [_judged(text, example.reference, cfg.data.source) for example, text in zip(own, answers)]
        found += zip(parallel.share(places), judged)
    names = list(_judged("", "", cfg.data.source))
    numbers = {name: _mean([flags[name] for _, flags in found]) for name in names}
    for level in sorted({example.level for example in examples if example.level is not None}):
        of_level = [flags["exact_match"] for place, flags in found if examples[place].level == level]
        numbers[f"exact_match_level_{level}"] = _mean(of_level)
    every = dict(itertools.chain.from_iterable(parallel.gather(found)))
    return Measured(numbers, {name: [every[place][name] for place in sorted(every)] for name in names})


def _judged(text: str, reference: str, source: str) -> dict[str, bool]:
    """Of an answer, whether it is right, and of one that is to be data whether it is valid."""
    if source == "records":
        order = records.parsed(text)
        return {"exact_match": order is not None and order == records.parsed(reference), "valid": order is not None}
    return {"exact_match": _plain(text) == _plain(reference)}


def _plain(text: str) -> str:
    return " ".join(text.split())


def _mean(flags: list[bool]) -> float:
    """The share of flags that are true, over all processes."""
    right, all_of_them = parallel.total(sum(flags), len(flags))
    return right / all_of_them
