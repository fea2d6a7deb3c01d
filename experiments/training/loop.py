"""The training loop: AdamW on fp32 weights, a learning-rate schedule, accumulation, clipping, evaluation on the way."""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from experiments.config import Config, tokens_a_pass
from experiments.data.buckets import Bucket, buckets, pack_bucket
from experiments.data.chat import Example
from experiments.data.packing import packs
from experiments.data.samples import Data, batches
from experiments.errors import UserError
from experiments.system import machine, parallel
from experiments.system.progress import Progress
from experiments.training.engines import Engine
from experiments.training.evaluation import Evaluation
from experiments.training.gradients import accumulate, autocast_of, checkpoint_blocks
from experiments.training.graphs import Eager, Graphs, cannot_capture, own_dropout
from experiments.training.loss import LabelLoss
from experiments.training.offload import offload_of
from experiments.training.optim import make_optimizer, with_room
from experiments.training.packing import Packing
from experiments.training.step import Reading, StaticStep, needs_the_host, on_gpu
from experiments.training.trained import Trained, lr_factor
from modules import parameter_groups
from modules.norms import Norms

CHECKPOINT_SECONDS = 300  # between the checkpoints that nobody asked for


def checkpoints_by_time(cfg: Config) -> bool:
    """Whether checkpoints are those that nobody asked for: one every CHECKPOINT_SECONDS. Of an adapter they are small.
    Where every weight trains they take twelve bytes a parameter, so there are none unless they are asked for."""
    return cfg.trainer.checkpoint_every is None and cfg.method.adapter != "none"


class Trainer:
    """Trains a model in place. Its attributes that are not arguments change from step to step; checkpoints keep them
    (experiments/runs/checkpoints.py).

    Args:
        dtype: to compute in. Weights that train are fp32; where all of them do, matmuls run under autocast.
        pad_id: token that fills short samples up.
        engine: the engine that has placed the model; None: none has.

    Attributes:
        between_steps: whether all state is that of one step, so that a checkpoint of it can go on.

    Raises:
        UserError: packing, checkpointing or CUDA graphs where they cannot be; no room for the optimizer's pages.
    """

    def __init__(
        self, model: PreTrainedModel, cfg: Config, dtype: torch.dtype, pad_id: int, engine: Engine | None = None
    ):
        self.model, self.cfg, self.dtype, self.pad_id = model, cfg, dtype, pad_id
        self.engine = engine or Engine(model.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = parameter_groups(model, cfg.lr, cfg.trainer.loraplus_lr_ratio)
        self.label_loss = LabelLoss(model, cfg.trainer.compile)
        with autocast_of(model, dtype):  # a kernel may take this dtype alone
            self.packing = Packing(model, tokens_a_pass(cfg), on_gpu(model)) if cfg.data.packing else None
        reason = needs_the_host(cfg, self.label_loss, dtype, self.packing)
        self.optimizer = make_optimizer(cfg, groups, capturable=reason is None)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, cfg.trainer))
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=dtype == torch.float16)
        self.trained = Trained()
        self.between_steps = True
        self.saved_at, self.late = time.monotonic(), False
        if cfg.trainer.gradient_checkpointing:
            checkpoint_blocks(model, reason is None and own_dropout(model) is None, offload_of(cfg, model.device))
        # passes over the same weights
        several = cfg.trainer.grad_accum > 1 or cfg.trainer.gradient_checkpointing or cfg.trainer.mlp_tokens is not None
        self.norms = Norms(model) if several and not cfg.trainer.compile else None
        graphs = self._graphs(reason or cannot_capture(cfg, model))
        about = (cfg, self.label_loss, self.optimizer, dtype, graphs, self.norms, self.packing)
        self.static = None if reason else StaticStep(*about)
        self.pending: list[_Pending] = []
        self.label_loss.forward = self.engine.forward_of(self.label_loss.forward)
        if model.device.type == "cpu":
            machine.keep_freed_memory()

    def _graphs(self, reason: str | None) -> Graphs | Eager:
        """CUDA graphs as the configuration says; `reason`: why there can be none."""
        asked = self.cfg.trainer.cuda_graphs
        if asked == "true" and reason is not None:
            raise UserError(f"trainer.cuda_graphs=true cannot be: {reason}; leave it out")
        if asked == "auto" and reason is not None and on_gpu(self.model):
            print(f"steps run eagerly, not in CUDA graphs: {reason}")
        return Eager() if reason is not None or asked == "false" else Graphs(self.model.device)

    def fit(
        self,
        data: Data,
        log: Callable[[dict], None],
        measure: Callable[[], Evaluation],
        save: Callable[[], None],
        save_best: Callable[[], None],
    ) -> None:
        """Train until `trained.finished`, from where `trained` says.

        Args:
            log: takes one record a step: step, loss, lr, grad_norm, tokens, seconds. On a GPU a step late.
            measure: evaluates the model; called every `eval_every` steps and after the last.
            save: writes a checkpoint, evaluation included; called every `checkpoint_every` steps and after the last, or
                by time (`checkpoints_by_time`).
            save_best: keeps the weights; called after an evaluation better than all before, if `keep_best` is set.

        Raises:
            UserError: a loss or gradient is not a number. The weights are those before that step.
            KeyboardInterrupt: a signal came; the step that it came in is finished.
        """
        settings, trained = self.cfg.trainer, self.trained
        stream = self._stream(data, served=trained.steps * settings.grad_accum)
        if self.static is not None:
            self.static.buckets = self._buckets(data)

        def tell(records: list[dict]) -> None:
            for record in records:
                if record["step"] == settings.steps or record["step"] % settings.log_every == 0:
                    log(record)
                progress.advance(loss=record["loss"], tokens_per_s=record["tokens"] / record["seconds"])

        self.model.train()
        with Progress(settings.steps, "training", trained.steps) as progress:
            self._measure_if_due(measure, save_best)  # a checkpoint may be from before the evaluation of its step
            while not trained.finished(settings):
                tell(self.step(list(itertools.islice(stream, settings.grad_accum))))
                if parallel.interrupted() or self._measure_is_due() or self._checkpoint_is_due():
                    tell(self.settle())
                self._measure_if_due(measure, save_best)
                if self._checkpoint_is_due():
                    save()
                    self.saved_at = time.monotonic()
                if not self.pending:  # else the next step's numbers come first
                    parallel.stop_if_interrupted()

    def _stream(self, data: Data, served: int) -> Iterator[list[Example]]:
        """The batches or packs that follow the first `served`."""
        if self.packing is not None:
            return packs(data.train, self.packing.tokens, self.cfg.seed, start=served)
        return batches(data.train, self.cfg.trainer.batch_size, self.cfg.seed, start=served)

    def _buckets(self, data: Data) -> list[Bucket]:
        if self.packing is not None:
            return [pack_bucket(data.train, self.packing.tokens, self.cfg.seed)]
        return buckets(data.train, self.cfg.trainer.batch_size, self.cfg.seed)

    def _measure_is_due(self) -> bool:
        settings, trained = self.cfg.trainer, self.trained
        due = trained.steps == settings.steps or (settings.eval_every and trained.steps % settings.eval_every == 0)
        return bool(due) and trained.evaluated < trained.steps

    def _measure_if_due(self, measure: Callable[[], Evaluation], save_best: Callable[[], None]) -> None:
        if self._measure_is_due() and self.trained.judge(self._finite(measure())) and self.cfg.trainer.keep_best:
            save_best()

    def _checkpoint_is_due(self) -> bool:
        every, finished = self.cfg.trainer.checkpoint_every, self.trained.finished(self.cfg.trainer)
        if checkpoints_by_time(self.cfg):  # `keep_best` goes on to other weights, which no checkpoint can begin from
            return self.late or (finished and self.cfg.trainer.keep_best)
        return bool(every) and (finished or self.trained.steps % every == 0)

    def step(self, group: list[list[Example]]) -> list[dict[str, float]]:
        """One optimizer step on the mean loss of a group of batches.

        Returns:
            The records of the steps whose numbers are there: of this one, or on a GPU of the one before it, whose
            numbers are read while this one is computed (`settle` waits for the rest).
        """
        start = time.perf_counter()
        self.between_steps = False
        lr, before = self.schedule.get_last_lr()[0], self.trained.tokens
        numbers = self._step_now(group) if self.static is None else self._step_later(group)
        self.schedule.step()
        self.trained.steps += 1
        self.trained.tokens += sum(len(example.input_ids) for batch in group for example in batch)
        self.trained.seconds += (seconds := time.perf_counter() - start)
        self.between_steps = True
        if self.cfg.trainer.compile and self.trained.steps == 1:
            print(f"compiled with the first step: {seconds:.0f} s; the code is kept for the next run")
        self.pending.append(_Pending(self.trained.steps, numbers, lr, before, self.trained.tokens))
        return self.settle(but=0 if self.static is None else 1)

    def settle(self, but: int = 0) -> list[dict[str, float]]:
        """Wait for the numbers of all steps but the newest `but`; returns the records of those not told yet.

        Raises:
            UserError: a loss or gradient is not a number. The weights are those before that step.
        """
        records = []
        while len(self.pending) > but:
            start, pending = time.perf_counter(), self.pending.pop(0)
            loss, grad_norm = pending.numbers.get()
            if self.static is not None and not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self.trained.steps, self.trained.tokens = pending.step - 1, pending.tokens_before
                self.pending.clear()
                self.between_steps = False
                raise self._not_finite(loss, grad_norm, pending.step)
            self.trained.seconds += time.perf_counter() - start
            record = {"step": pending.step, "loss": loss, "lr": pending.lr, "grad_norm": grad_norm}
            records.append(record | {"tokens": pending.tokens, "seconds": self.trained.seconds})
        return records

    def _checkpoint_is_late(self) -> bool:
        return parallel.is_main() and time.monotonic() - self.saved_at > CHECKPOINT_SECONDS

    def _step_later(self, group: list[list[Example]]) -> Reading:
        """Start a step on the device, whose numbers come later."""
        self.late = self._checkpoint_is_late()
        compute = functools.partial(self.static.add_gradients, group, self.pad_id)
        with_room(self.optimizer, self.model.device, compute)
        self.static.update()
        return Reading(self.static.numbers)

    def _step_now(self, group: list[list[Example]]) -> Reading:
        """A step whose loss and gradients the host looks at before weights change."""
        step = self.trained.steps + 1
        context = (self.pad_id, self.dtype, self.scaler, self.engine, self.packing)
        compute = functools.partial(accumulate, self.label_loss, group, *context)
        with contextlib.nullcontext() if self.norms is None else self.norms.kept():
            total = with_room(self.optimizer, self.model.device, compute)
        loss, late = parallel.total(total, float(self._checkpoint_is_late()))  # the processes' clocks differ
        self.late = late > 0
        if not math.isfinite(loss):
            raise self._not_finite(loss, 0.0, step)
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.trainer.max_grad_norm or math.inf)
        if hasattr(grad_norm, "full_tensor"):  # of sharded gradients
            grad_norm = grad_norm.full_tensor()
        grad_norm = float(grad_norm)
        if not math.isfinite(grad_norm) and self.scaler.get_scale() <= 1:  # at a larger scale it skips the step, halves
            self.optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(loss, grad_norm, step)
        self.engine.update(self.optimizer, lambda: self.scaler.step(self.optimizer))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Reading(torch.tensor([loss, grad_norm], dtype=torch.float64, device="cpu"))

    def _not_finite(self, loss: float, grad_norm: float, step: int) -> UserError:
        if not math.isfinite(loss):
            return self._stopped(f"the training loss became {loss} at step {step}", step - 1)
        return self._stopped(f"the gradients became {grad_norm} at step {step}, under a loss of {loss:g}", step - 1)

    def _finite(self, evaluation: Evaluation) -> Evaluation:
        step = self.trained.steps
        if not math.isfinite(evaluation.loss):
            raise self._stopped(f"the held-out loss became {evaluation.loss} after step {step}", step)
        return evaluation

    def _stopped(self, reason: str, step: int) -> UserError:
        return UserError(f"{reason}: stopped with the weights of step {step}; try a lower lr than {self.cfg.lr:g}")


@dataclass
class _Pending:
    """A step whose numbers are not read yet."""

    step: int
    numbers: Reading
    lr: float
    tokens_before: int
    tokens: int


def heldout_record(evaluation: Evaluation) -> dict[str, float]:
    return {"heldout_loss": evaluation.loss, "heldout_token_accuracy": evaluation.token_accuracy}
