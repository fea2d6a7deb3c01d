"""Held-out loss, perplexity and token accuracy."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from experiments.data.chat import IGNORED, Example
from experiments.data.samples import collate, eval_batches
from experiments.errors import UserError
from experiments.system import parallel
from experiments.training.expert_load import ExpertLoad
from modules.adapters.prefix import prompt_lengths


@dataclass(frozen=True)
class Evaluation:
    """Means over the labelled tokens of a set: loss in nats a token, accuracy of the likeliest token."""

    loss: float
    token_accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def label_logits(
    model: PreTrainedModel, batch: dict[str, Tensor], forward: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] for the n labelled tokens of a batch, and those tokens [n].

    The output embeddings run at those positions only: most of a prompt's tokens carry no label, and the product with
    the vocabulary is the largest of a small model.

    Args:
        forward: is called in place of `model`, such as torch's DDP around it.
    """
    targets, labelled = label_positions(batch)
    with _head_sees_only(model, labelled), prompt_lengths(model, label_starts(batch)):
        output = (forward or model)(**model_inputs(batch), use_cache=False)
    return output.logits, targets


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model gets."""
    return {name: value for name, value in batch.items() if name != "labels"}


def label_positions(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(the n labelled tokens of a batch [n], the positions [B, T] whose hidden states predict them)"""
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
    labelled = targets != IGNORED
    return targets[labelled], labelled


def label_starts(batch: dict[str, Tensor]) -> Tensor:
    """The position of the first labelled token of each sample, where its prompt ends: int64 [B]."""
    return (batch["labels"] != IGNORED).int().argmax(1)


@contextlib.contextmanager
def _head_sees_only(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Inside, the output embeddings get hidden states [n, hidden] of `positions` [B, T] instead of [B, T, hidden]."""

    def select(_, args: tuple) -> tuple:
        if args[0].shape[:2] != positions.shape:
            raise UserError(
                f"{type(model).__name__} computes logits of states {list(args[0].shape)} for tokens "
                f"{list(positions.shape)}: only models that predict one token at each place can be trained"
            )
        return args[0][positions], *args[1:]

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()  # not inference_mode, whose tensors FSDP could not train with afterwards
def evaluate(
    model: PreTrainedModel,
    examples: list[Example],
    batch_size: int,
    pad_id: int,
    progress: Callable[[Iterable], Iterable] = iter,
    load: ExpertLoad | None = None,
) -> Evaluation:
    """Measure `model` on `examples`, `batch_size` at a time; each process does its share. Leaves the model in
    the mode (training or not) it was in. `load` counts the tokens of its experts."""
    training = model.training
    model.eval()
    loss = correct = tokens = 0.0
    for group in progress(eval_batches(examples, batch_size * parallel.size())):
        share = parallel.share(group)
        batch = to_device(collate(share or [group[0].unlabelled()], pad_id), model.device)
        mask = batch["attention_mask"] * bool(share)
        with contextlib.nullcontext() if load is None else load.counting(mask):
            logits, targets = label_logits(model, batch)
        found = F.cross_entropy(logits.float(), targets, reduction="sum").double().item()
        sums = parallel.total(found, (logits.argmax(dim=-1) == targets).sum().item(), targets.numel())
        parallel.stop_if_interrupted()
        loss, correct, tokens = (a + b for a, b in zip((loss, correct, tokens), sums))
    model.train(training)
    return Evaluation(loss / tokens, correct / tokens, int(tokens))
