"""A real training step on this machine: allocated bytes, and seconds.

On a GPU the peak is torch.cuda.max_memory_allocated. On a CPU it is the highest sum of what torch's allocator gave out
and took back, as torch.profiler records it, above the model and the optimizer's state that were there before. Neither
counts the memory of Python and the libraries themselves.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.config import Config
from experiments.data.chat import Example
from experiments.models.load import prepare_model
from experiments.plan.budget import Budget, stored
from experiments.training.loop import Trainer
from kernels.bench.memory import highest

TIMED_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """Bytes allocated, by the names of Budget; peak of a step after the first, and its seconds (median)."""

    packed: int
    constants: int
    dense: int
    adapters: int
    gradients: int
    state: int
    peak: int
    seconds: float


def allocated(tensors: list[Tensor]) -> int:
    """Bytes of the memory that `tensors` are in; shared memory once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(cfg: Config, device: torch.device, dtype: torch.dtype, batch: int, seq: int) -> Measured:
    """Train the configured model for a few steps on tokens that mean nothing.

    Raises:
        UserError: the model has no weights here, or cannot be trained so.
    """
    torch.manual_seed(cfg.seed)
    model, tokenizer = prepare_model(cfg, device, dtype)
    trainer = Trainer(model.train(), cfg, dtype, tokenizer.pad_token_id)
    draw = torch.Generator().manual_seed(cfg.seed)
    vocabulary = model.config.get_text_config().vocab_size
    examples = [
        Example(ids, ids)
        for ids in torch.randint(vocabulary, (cfg.trainer.grad_accum * batch, seq), generator=draw).tolist()
    ]
    group = [examples[i : i + batch] for i in range(0, len(examples), batch)]
    gradients: list[int] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(allocated([p.grad for p in trainer.parameters if p.grad is not None]))
    )
    trainer.step(group)  # makes the optimizer's state
    parts = stored(model)
    state = _state(trainer)
    peak = _peak(trainer, group, device, allocated(parts.all()) + state)
    seconds = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        trainer.step(group)
        trainer.settle()  # a GPU is done then
        seconds.append(time.perf_counter() - start)
    return Measured(
        packed=allocated(parts.packed),
        constants=allocated(parts.constants),
        dense=allocated(parts.dense),
        adapters=allocated(parts.adapters),
        gradients=gradients[0],
        state=state,
        peak=peak,
        seconds=statistics.median(seconds),
    )


def _state(trainer: Trainer) -> int:
    pages = trainer.optimizer.pages
    if pages is not None:
        return pages.peak_resident_bytes
    states = trainer.optimizer.state.values()
    return allocated([tensor for state in states for name, tensor in state.items() if name != "step"])


def _peak(trainer: Trainer, group: list[list[Example]], device: torch.device, before: int) -> int:
    """Peak bytes of a step; `before` is the allocated memory when it begins."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        trainer.step(group)
        return torch.cuda.max_memory_allocated(device)
    return before + highest(lambda: trainer.step(group))


def comparison(needs: Budget, measured: Measured, checkpointing: bool) -> str:
    """Plan and measurement side by side."""
    lines = [f"{'bytes':<28}{'plan':>18}{'measured':>18}{'':>10}"]
    planned = {
        name: getattr(needs, name) for name in ("packed", "constants", "dense", "adapters", "gradients", "state")
    }
    planned["peak"] = needs.peak(checkpointing)
    titles = {
        "packed": "weights, packed",
        "constants": "quantization constants",
        "dense": "weights, not packed",
        "state": "optimizer state",
        "peak": "peak of a step",
    }
    for name, size in planned.items():
        found = getattr(measured, name)
        if size or found:
            verdict = "equal" if size == found else f"{found / size - 1:+.1%}" if size else ""
            lines.append(f"{titles.get(name, name):<28}{size:>18,}{found:>18,}{verdict:>10}")
    return "\n".join([*lines, f"{measured.seconds:.2f} s a step (median of {TIMED_STEPS})"])
