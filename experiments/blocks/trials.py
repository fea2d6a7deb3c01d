"""Held-out loss of a model under one choice of block sizes after another, on the same tokens.

The model stays dense: a packed linear computes with its unpacked weight, as NF4Linear does.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

import kernels
from experiments.data.chat import IGNORED, Example
from experiments.data.samples import collate, eval_batches
from experiments.training.evaluation import label_logits, to_device
from modules import decoder_linears
from modules.linear import dense_weight


@dataclass(frozen=True)
class Losses:
    """Losses of a set of samples.

    Attributes:
        sums: nats, float64 [samples]. tokens: labelled ones, int64 [samples].
    """

    sums: numpy.ndarray
    tokens: numpy.ndarray

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.sums.sum() / self.tokens.sum())

    def above(self, other: "Losses") -> tuple[float, float]:
        """(how much higher the loss is than `other`'s on the same samples, the standard error of that).

        Samples are independent of each other, tokens of one sample are not: the error is that of a ratio of sums over
        samples.
        """
        difference, n = self.sums - other.sums, len(self.sums)
        mean = difference.sum() / self.tokens.sum()
        spread = numpy.square(difference - mean * self.tokens).sum() * n / max(1, n - 1)
        return float(mean), math.sqrt(spread) / float(self.tokens.sum())


@dataclass
class Trial:
    """One choice of block sizes.

    Attributes:
        kind: dense, uniform, tuned, map or alone.
        blocksizes: of each linear that is packed.
        constants: bits of all constants.
        beside: the uniform block size with as many bits or more that it is compared with.
        losses: by the name of the data.
    """

    title: str
    kind: str
    blocksizes: Mapping[str, int]
    constants: int = 0
    beside: int | None = None
    losses: dict[str, Losses] = field(default_factory=dict)


class Packable:
    """A dense model, in evaluation mode, that can compute as if its linears were packed.

    Args:
        double, quant_type: see `kernels.quantize_4bit`.
    """

    def __init__(self, model: PreTrainedModel, double: bool, quant_type: str = "nf4"):
        self.linears, self.how = decoder_linears(model), (double, quant_type)
        self.dense = {name: dense_weight(linear).detach().clone() for name, linear in self.linears.items()}

    @torch.no_grad()
    def pack(self, blocksizes: Mapping[str, int]) -> None:
        """Pack the linears that `blocksizes` names; the others are dense again."""
        for name, linear in self.linears.items():
            weight = self.dense[name]
            if name in blocksizes:
                weight = kernels.dequantize_4bit(*kernels.quantize_4bit(weight, blocksizes[name], *self.how))
            dense_weight(linear).copy_(weight)


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    examples: list[Example],
    batch_size: int,
    pad_id: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Losses:
    """The loss of each of `examples`."""
    sums, tokens = [], []
    for group in progress(eval_batches(examples, batch_size)):
        batch = to_device(collate(group, pad_id), model.device)
        logits, targets = label_logits(model, batch)
        losses = F.cross_entropy(logits.float(), targets, reduction="none").double().cpu()
        counts = [sum(label != IGNORED for label in example.labels[1:]) for example in group]
        sums += [of_sample.sum().item() for of_sample in losses.split(counts)]
        tokens += counts
    return Losses(numpy.array(sums), numpy.array(tokens))
