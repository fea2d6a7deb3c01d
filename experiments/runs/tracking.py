"""Where a run's numbers go besides its own directory: nowhere, or Weights & Biases.

W&B's own environment variables (WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, …) decide whether and how it goes online.
With WANDB_MODE=offline all of it waits in the run's wandb/ for `wandb sync`, which takes the adapter from adapter/ and
tables from W&B's own data folder.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from experiments.config import Config
from experiments.errors import UserError
from experiments.system import parallel


class Tracker(Protocol):
    run_id: str | None  # the service's name for the run

    def log(self, record: dict) -> None:
        """Take one record of metrics.jsonl; its "step" is the x axis."""

    def summarize(self, result: dict) -> None:
        """Take the run's result."""

    def keep(self, adapter: Path) -> None:
        """Take the directory of the trained adapter."""

    def show(self, samples: list[dict[str, str]]) -> None:
        """Take prompts with reference and the model's texts before and after."""


class NoTracker:
    run_id = None

    def log(self, record: dict) -> None:
        pass

    def summarize(self, result: dict) -> None:
        pass

    def keep(self, adapter: Path) -> None:
        pass

    def show(self, samples: list[dict[str, str]]) -> None:
        pass


class WandbTracker:
    def __init__(self, wandb, run):
        self.wandb, self.run, self.run_id = wandb, run, run.id

    def log(self, record: dict) -> None:
        self.run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def summarize(self, result: dict) -> None:
        self.run.summary.update(result)

    def keep(self, adapter: Path) -> None:
        artifact = self.wandb.Artifact(f"{self.run_id}-adapter", type="adapter")
        artifact.add_dir(str(adapter.absolute()), policy="immutable")  # no second copy in W&B's own cache
        self.run.log_artifact(artifact)

    def show(self, samples: list[dict[str, str]]) -> None:
        if samples:
            columns = list(samples[0])
            self.run.log({"samples": self.wandb.Table(columns, [list(sample.values()) for sample in samples])})


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
    try:
        import wandb  # here, because importing it takes a second that other runs need not spend
    except ImportError as error:
        raise UserError("tracking=wandb needs Weights & Biases: pip install wandb") from error

    try:
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
    except wandb.Error as error:
        how = "run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline keeps the run on this machine"
        raise UserError(f"tracking=wandb: {' '.join(str(error).split())}: {how}") from error
    exit_code = 1
    try:
        yield WandbTracker(wandb, run)
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)
