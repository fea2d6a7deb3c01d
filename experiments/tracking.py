"""Where a run's numbers go besides its own directory: nowhere, or Weights & Biases.

W&B's own environment variables (WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, …) decide whether and how it goes online.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from experiments import parallel
from experiments.config import Config
from experiments.errors import UserError


class Tracker(Protocol):
    run_id: str | None  # what the service knows the run by

    def log(self, record: dict) -> None:
        """Take one record of metrics.jsonl; its "step" is the x axis."""

    def summarize(self, result: dict) -> None:
        """Take the run's result."""


class NoTracker:
    run_id = None

    def log(self, record: dict) -> None:
        pass

    def summarize(self, result: dict) -> None:
        pass


class WandbTracker:
    def __init__(self, run):
        self.run, self.run_id = run, run.id

    def log(self, record: dict) -> None:
        self.run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def summarize(self, result: dict) -> None:
        self.run.summary.update(result)


@contextlib.contextmanager
def tracker(cfg: Config, directory: Path, run_id: str | None = None) -> Iterator[Tracker]:
    """The configured tracker; whatever happens inside, it is finished properly (exit code 1 after an error).

    Args:
        run_id: of the run to go on with.
    """
    if cfg.tracking.name == "none" or not parallel.is_main():
        yield NoTracker()
        return
    if cfg.tracking.name != "wandb":
        raise UserError(f"tracking.name={cfg.tracking.name}: choose none or wandb")
    import wandb  # here, because importing it takes a second that other runs need not spend

    run = wandb.init(
        project=cfg.tracking.project,
        group=cfg.tracking.group,
        tags=cfg.tracking.tags,
        name=directory.name,
        config=asdict(cfg),
        dir=str(directory),
        id=run_id,
        resume="allow" if run_id else None,
    )
    exit_code = 1
    try:
        yield WandbTracker(run)
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)
