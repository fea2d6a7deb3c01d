"""Gradients of a group of batches where the host watches them, and activations that backward computes again."""

import contextlib
import math

import torch
from transformers import PreTrainedModel

from experiments.data.chat import IGNORED, Example
from experiments.data.samples import collate
from experiments.errors import UserError
from experiments.system import parallel
from experiments.training.engines import Engine
from experiments.training.evaluation import to_device
from experiments.training.loss import LabelLoss
from modules import seeds


def checkpoint_blocks(model: PreTrainedModel, capturable: bool = False) -> None:
    """Have each block compute its activations again in backward, with the random numbers of the first time.

    Args:
        capturable: by keeping the seeds of the adapters' dropout. The model must have no dropout of its own.

    Raises:
        UserError: the model is not made for it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot do trainer.gradient_checkpointing=true: leave it out")
    random = {"preserve_rng_state": False, "context_fn": seeds.kept} if capturable else {"preserve_rng_state": True}
    model.activation_checkpointing_enable({"use_reentrant": False, **random})
    model.disable_input_require_grads()  # only the reentrant kind needs gradients of the embeddings' output


def accumulate(
    label_loss: LabelLoss,
    group: list[list[Example]],
    pad_id: int,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    engine: Engine,
) -> float:
    """Add the gradients of the mean loss over all labelled tokens of the batches. Each process computes its share.

    Returns:
        The share of the loss that this process computed.
    """
    labelled = sum(label != IGNORED for batch in group for example in batch for label in example.labels[1:])
    model = label_loss.model
    # Base weights are in `dtype` already if they are frozen; if they train they are fp32, and autocast converts.
    casts = dtype != torch.float32 and next(model.parameters()).dtype == torch.float32
    autocast = torch.autocast(model.device.type, dtype) if casts else contextlib.nullcontext()
    total = 0.0
    for i, batch in enumerate(group, start=1):
        own = parallel.share(batch) or [batch[0].unlabelled()]
        with engine.accumulate(label_loss.forward, last=i == len(group)):
            with autocast:
                loss = label_loss(to_device(collate(own, pad_id), model.device)) / labelled
            total += loss.item()
            if math.isfinite(total) or parallel.size() > 1:  # the others wait for this one's gradients
                scaler.scale(loss * parallel.size()).backward()
    return total
