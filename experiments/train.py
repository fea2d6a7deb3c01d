"""The training loop: AdamW on fp32 weights, a learning-rate schedule, accumulation, clipping, evaluation on the way."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from experiments.config import Config, TrainerConfig
from experiments.data import Data, batches, collate
from experiments.data_chat import IGNORED, Example
from experiments.errors import UserError
from experiments.evaluate import Evaluation, evaluate, label_logits, to_device
from experiments.progress import Progress, bar


@dataclass
class Trained:
    """What training took: optimizer steps done, tokens seen (padding not counted), seconds without evaluations."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def lr_factor(step: int, trainer: TrainerConfig) -> float:
    """Learning rate at `step` (from 0) as a share of its highest."""
    warmup = round(trainer.warmup * trainer.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, trainer.steps - warmup)
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[trainer.schedule]


def train(
    model: PreTrainedModel,
    data: Data,
    cfg: Config,
    dtype: torch.dtype,
    pad_id: int,
    log: Callable[[dict], None],
    trained: Trained,
) -> None:
    """Train `model` in place for `cfg.trainer.steps` steps.

    Args:
        dtype: to compute in. Weights that train are fp32; where all of them do, matmuls run under autocast.
        log: takes one record a step: step, loss, lr, grad_norm, tokens, seconds; and one an evaluation: step,
            heldout_loss, heldout_token_accuracy.
        trained: kept up to date step by step, so that it is right also after an interruption.

    Raises:
        UserError: the loss is not a number. The weights are those before that step.
    """
    trainer = cfg.trainer
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=trainer.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, trainer))
    scaler = torch.amp.GradScaler(model.device.type, enabled=dtype == torch.float16)
    stream = batches(data.train, trainer.batch_size, cfg.seed)
    model.train()
    with Progress(trainer.steps, "training") as progress:
        for step in range(1, trainer.steps + 1):
            start = time.perf_counter()
            group = list(itertools.islice(stream, trainer.grad_accum))
            loss = _accumulate(model, group, pad_id, dtype, scaler)
            if not math.isfinite(loss):
                raise UserError(
                    f"the training loss became {loss} at step {step}: stopped with the weights of step {step - 1}; "
                    f"try a lower lr than {cfg.lr:g}"
                )
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm or math.inf)
            lr = schedule.get_last_lr()[0]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            tokens = sum(len(example.input_ids) for batch in group for example in batch)
            seconds = time.perf_counter() - start
            trained.steps, trained.tokens, trained.seconds = step, trained.tokens + tokens, trained.seconds + seconds
            record = {"step": step, "loss": loss, "lr": lr, "grad_norm": float(grad_norm)}
            if step % trainer.log_every == 0 or step == trainer.steps:
                log(record | {"tokens": trained.tokens, "seconds": trained.seconds})
            progress.advance(loss=loss, tokens_per_s=trained.tokens / trained.seconds)
            if trainer.eval_every and step % trainer.eval_every == 0 and step < trainer.steps:
                measured = evaluate(model, data.heldout, trainer.eval_batch_size, pad_id, bar("evaluating"))
                log({"step": step} | heldout_record(measured))


def heldout_record(evaluation: Evaluation) -> dict[str, float]:
    return {"heldout_loss": evaluation.loss, "heldout_token_accuracy": evaluation.token_accuracy}


def _accumulate(
    model: PreTrainedModel,
    group: list[list[Example]],
    pad_id: int,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
) -> float:
    """Add to the gradients those of the mean loss over all labelled tokens of the batches; return that loss."""
    labelled = sum(label != IGNORED for batch in group for example in batch for label in example.labels[1:])
    # Base weights are in `dtype` already if they are frozen; if they train they are fp32, and autocast converts.
    casts = dtype != torch.float32 and next(model.parameters()).dtype == torch.float32
    autocast = torch.autocast(model.device.type, dtype) if casts else contextlib.nullcontext()
    total = 0.0
    for batch in group:
        with autocast:
            logits, targets = label_logits(model, to_device(collate(batch, pad_id), model.device))
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / labelled
        total += loss.item()
        if math.isfinite(total):
            scaler.scale(loss).backward()
    return total
