"""Held-out loss, perplexity and token accuracy."""

import contextlib
import itertools
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

FP32_BYTES = 2**25  # of logits at once


@dataclass(frozen=True)
class Evaluation:
    """Means over the labelled tokens of a set: loss in nats a token, accuracy of the likeliest token."""

    loss: float
    token_accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class SampleLoss:
    """Of one sample: the sum of the loss over its labelled tokens, in nats, and how many these are."""

    nats: float
    tokens: int


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


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss of each token in nats, float64 [n], whether its target is the likeliest, bool [n]) of logits
    [n, vocabulary], some rows at a time: in fp32 they take more memory than all else."""
    losses, right = logits.new_empty(len(logits), dtype=torch.float64), torch.empty_like(targets, dtype=torch.bool)
    rows = max(1, FP32_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), rows):
        some, wanted = logits[start : start + rows].float(), targets[start : start + rows]
        losses[start : start + rows] = F.cross_entropy(some, wanted, reduction="none")
        right[start : start + rows] = some.argmax(-1) == wanted
    return losses, right


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


def evaluate(
    model: PreTrainedModel,
    examples: list[Example],
    batch_size: int,
    pad_id: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Evaluation:
    """Measure `model` on `examples`, `batch_size` at a time; each process does its share. Leaves the model in
    the mode (training or not) it was in."""
    return evaluate_each(model, examples, batch_size, pad_id, progress)[0]


@torch.no_grad()  # not inference_mode, whose tensors FSDP could not train with afterwards
def evaluate_each(
    model: PreTrainedModel,
    examples: list[Example],
    batch_size: int,
    pad_id: int,
    progress: Callable[[Iterable], Iterable] = iter,
    load: ExpertLoad | None = None,
) -> tuple[Evaluation, list[SampleLoss]]:
    """As `evaluate`; in process 0 also the loss of each example, in their order. `load` counts the tokens of experts.

    Batches are of examples of about one length, so packing would save a few percent at most.
    """
    training = model.training
    model.eval()
    loss = correct = tokens = 0.0
    each: list[tuple[int, SampleLoss]] = []
    batches = eval_batches(examples, batch_size * parallel.size())
    for group, places in zip(progress(batches), batches.places):
        share = parallel.share(group)
        own = share or [group[0].unlabelled()]
        batch = to_device(collate(own, pad_id), model.device)
        mask = batch["attention_mask"] * bool(share)
        with contextlib.nullcontext() if load is None else load.counting(mask):
            logits, targets = label_logits(model, batch)
        of_tokens, right = token_losses(logits, targets)
        sums = parallel.total(of_tokens.sum().item(), right.sum().item(), targets.numel())
        parallel.stop_if_interrupted()
        loss, correct, tokens = (a + b for a, b in zip((loss, correct, tokens), sums))
        rows = label_positions(batch)[1].nonzero()[:, 0]
        nats = torch.zeros(len(own), dtype=torch.float64, device=rows.device).index_add_(0, rows, of_tokens)
        counts = rows.bincount(minlength=len(own)).tolist()
        each += zip(parallel.share(places), map(SampleLoss, nats.tolist(), counts))
    model.train(training)
    gathered = sorted(itertools.chain.from_iterable(parallel.gather(each)), key=lambda one: one[0])
    return Evaluation(loss / tokens, correct / tokens, int(tokens)), [sample for _, sample in gathered]
