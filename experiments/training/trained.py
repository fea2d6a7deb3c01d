"""How far training has come, and the learning rate there."""

import math
from dataclasses import dataclass

from experiments.config import TrainerConfig
from experiments.training.evaluation import Evaluation


@dataclass
class Trained:
    """How far training has come.

    Attributes:
        steps: optimizer steps done.
        tokens: seen, padding not counted.
        seconds: without evaluations.
        evaluation: the newest one on held-out data; None before the first step's.
        best: the one with the lowest loss, made at step `best_step`.
        stale: evaluations since then.
        evaluated: the step of the newest evaluation.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluation: Evaluation | None = None
    best: Evaluation | None = None
    best_step: int = 0
    stale: int = 0
    evaluated: int = 0

    def finished(self, settings: TrainerConfig) -> bool:
        """Whether all steps are done, or early stopping has ended training."""
        patience = settings.early_stopping_patience
        return self.steps >= settings.steps or (patience > 0 and self.stale >= patience)

    def judge(self, evaluation: Evaluation) -> bool:
        """Take the evaluation of the step just done; True if none before had as low a loss."""
        self.evaluation, self.evaluated = evaluation, self.steps
        if self.best is None or evaluation.loss < self.best.loss:
            self.best, self.best_step, self.stale = evaluation, self.steps, 0
            return True
        self.stale += 1
        return False


def lr_factor(step: int, trainer: TrainerConfig) -> float:
    """Learning rate at `step` (from 0) as a share of its highest."""
    warmup = round(trainer.warmup * trainer.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, trainer.steps - warmup)
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[trainer.schedule]
