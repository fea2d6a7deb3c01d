"""Cross-entropy of the labelled tokens, without logits [tokens, vocabulary] in memory if the model allows it."""

import math
import os
import shutil

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from experiments.data.chat import IGNORED
from experiments.errors import UserError
from experiments.system.files import cache_dir
from experiments.training.evaluation import label_logits, label_positions, label_starts
from kernels import linear_cross_entropy
from modules.adapters.prefix import prompt_lengths


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """True if the model's logits are what its output embeddings give, without a softcap or scale behind. Also of a
    model without weights, on the meta device."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return False
    given = []
    hook = head.register_forward_hook(lambda _, args, output: given.append((output, output._version)))
    try:
        some = torch.arange(8, device=model.device).unsqueeze(0)
        logits = model(input_ids=some, use_cache=False).logits
    finally:
        hook.remove()
    output, version = given[0]
    return logits is output and output._version == version  # the version tells of changes in place


class LabelLoss:
    """Σ cross-entropy over the labelled tokens of a batch (input_ids, attention_mask, labels: each [B, T]).

    `padded` takes a batch of a fixed shape (data/buckets.py).

    Args:
        compiled: run the model through torch.compile, whose code is kept in the cache.

    Raises:
        UserError: there is no C++ compiler for a CPU's code.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False):
        self.model, self.forward = model, model
        self.plain_head = has_plain_head(model)  # without one the logits are materialised
        # of the batch whose loss is computed: bool [B, T], or places in the flattened [B · T]
        self.labelled: Tensor | None = None
        self.hidden: Tensor | None = None  # what the output embeddings got at these places
        # registered once: torch.compile would begin anew for another hook
        model.get_output_embeddings().register_forward_pre_hook(self._keep_labelled)
        if compiled:
            compiler = os.environ.get("CXX", "g++")
            if model.device.type == "cpu" and not shutil.which(compiler):
                raise UserError(
                    f"trainer.compile=true needs a C++ compiler, and {compiler} is not there: set CXX to one"
                )
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
            self.forward = torch.compile(model)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        if not self.plain_head:
            logits, targets = label_logits(self.model, batch, self.forward)
            return F.cross_entropy(logits.float(), targets, reduction="sum")
        targets, self.labelled = label_positions(batch)
        head = self.model.get_output_embeddings()
        try:
            with prompt_lengths(self.model, label_starts(batch)):
                self.forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            return linear_cross_entropy(self.hidden, head.weight, head.bias, targets)
        finally:
            self.labelled = self.hidden = None

    def padded(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch as `data/buckets.fill` makes it, computed without a look at its values."""
        targets, self.labelled = batch["targets"], batch["positions"]
        head = self.model.get_output_embeddings()
        try:
            with prompt_lengths(self.model, batch["starts"]):
                output = self.forward(input_ids=batch["input_ids"], use_cache=False)
            if not self.plain_head or (head.bias is not None and head.bias.requires_grad):
                logits = output.logits if not self.plain_head else head(self.hidden)
                return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
            # The op has no weights. A place without a label gets zeros, whose logits are the bias: its gradient is
            # zero, and its loss is known.
            empty = targets == IGNORED
            hidden = self.hidden.masked_fill(empty.unsqueeze(1), 0)
            loss = linear_cross_entropy(hidden, head.weight, head.bias, targets.clamp(min=0))
            return loss - empty.sum() * _loss_of_zeros(head)
        finally:
            self.labelled = self.hidden = None

    def _keep_labelled(self, head: torch.nn.Module, args: tuple) -> tuple:
        if self.labelled is None:
            return args
        flat = self.labelled.dtype == torch.int64
        self.hidden = args[0].flatten(0, 1).index_select(0, self.labelled) if flat else args[0][self.labelled]
        if not self.plain_head:
            return self.hidden, *args[1:]
        return self.hidden[:1], *args[1:]  # what the head makes of it is not used


def _loss_of_zeros(head: torch.nn.Linear) -> float | Tensor:
    """The cross-entropy of token 0 where the hidden state is zero."""
    if head.bias is None:
        return math.log(head.weight.shape[0])
    logits = head.bias.float()
    return logits.logsumexp(0) - logits[0]
