"""Gradients of a group of batches where the host watches them, and activations that backward computes again."""

import contextlib
import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.data.chat import IGNORED, Example
from experiments.data.samples import collate
from experiments.errors import UserError
from experiments.system import parallel
from experiments.training.engines import Engine
from experiments.training.evaluation import to_device
from experiments.training.loss import LabelLoss
from experiments.training.offload import Offload
from experiments.training.packing import Packing
from modules import seeds


def checkpoint_blocks(model: PreTrainedModel, capturable: bool = False, offload: Offload | None = None) -> None:
    """Have each block compute its activations again in backward, with the random numbers of the first time.

    Args:
        capturable: by keeping the seeds of the adapters' dropout. The model must have no dropout of its own.
        offload: keeps the inputs of blocks.

    Raises:
        UserError: the model is not made for it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot do trainer.gradient_checkpointing=true: leave it out")
    random = {"preserve_rng_state": False, "context_fn": seeds.kept} if capturable else {"preserve_rng_state": True}
    model.activation_checkpointing_enable({"use_reentrant": False, **random})
    model.disable_input_require_grads()  # only the reentrant kind needs gradients of the embeddings' output
    if offload is not None:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = offload.around(module._gradient_checkpointing_func)


def autocast_of(model: PreTrainedModel, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Around a forward pass that computes in `dtype`. Base weights are in it already if they are frozen; if they train
    they are fp32, and autocast converts."""
    casts = dtype != torch.float32 and next(model.parameters()).dtype == torch.float32
    return torch.autocast(model.device.type, dtype) if casts else contextlib.nullcontext()


def accumulate(
    label_loss: LabelLoss,
    group: list[list[Example]],
    pad_id: int,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    engine: Engine,
    packing: Packing | None = None,
) -> float:
    """Add the gradients of the mean loss over all labelled tokens of the batches. Each process computes its share.

    Args:
        packing: the batches are packs, which the model gets so.

    Returns:
        The share of the loss that this process computed.
    """
    labelled = sum(label != IGNORED for batch in group for example in batch for label in example.labels[1:])
    model = label_loss.model
    total = 0.0
    for i, batch in enumerate(group, start=1):
        tensors = packing.batch(batch, pad_id) if packing else _padded(batch, pad_id, model.device)
        around = packing.around() if packing else contextlib.nullcontext()
        with around, engine.accumulate(label_loss.forward, last=i == len(group)):
            with autocast_of(model, dtype):
                loss = label_loss(tensors) / labelled
            total += loss.item()
            if math.isfinite(total) or parallel.size() > 1:  # the others wait for this one's gradients
                scaler.scale(loss * parallel.size()).backward()
    return total


def _padded(batch: list[Example], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """This process' share of a batch."""
    return to_device(collate(parallel.share(batch) or [batch[0].unlabelled()], pad_id), device)
