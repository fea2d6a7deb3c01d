"""Where a run's numbers go besides its own files: nowhere, to Weights & Biases, or to files for TensorBoard.

W&B's own environment variables (WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, …) decide whether and how it goes online.
With WANDB_MODE=offline all of it waits in the run's wandb/ for `wandb sync`, which takes the adapter from adapter/ and
tables from W&B's own data folder.

TensorBoard's files are in the run's tensorboard/: metrics, samples as text, settings with results as hyperparameters.
"""

import contextlib
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from experiments.config import Config, flat
from experiments.errors import UserError
from experiments.system import parallel

TENSORBOARD = "tensorboard"  # in a run's directory


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


class TensorBoardTracker:
    run_id = None

    def __init__(self, writer, settings: dict):
        self.writer, self.settings = writer, settings

    def log(self, record: dict) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()

    def summarize(self, result: dict) -> None:
        settings = {name: value for name, value in self.settings.items() if isinstance(value, bool | int | float | str)}
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        self.writer.add_hparams(settings, numbers, run_name=".")

    def keep(self, adapter: Path) -> None:
        """It is beside TensorBoard's files already."""

    def show(self, samples: list[dict[str, str]]) -> None:
        for number, sample in enumerate(samples, start=1):
            parts = (f"**{name}**\n\n{textwrap.indent(text, '    ')}" for name, text in sample.items())
            self.writer.add_text(f"samples/{number}", "\n\n".join(parts))


@contextlib.contextmanager
def tracker(cfg: Config, directory: Path, run_id: str | None = None, step: int = 0) -> Iterator[Tracker]:
    """The configured tracker; whatever happens inside, it is finished properly (exit code 1 after an error).

    Args:
        run_id: of the run to go on with.
        step: that the run goes on after; later records of a killed run come again.
    """
    if cfg.tracking.name == "none" or not parallel.is_main():
        yield NoTracker()
    elif cfg.tracking.name == "wandb":
        with _wandb(cfg, directory, run_id) as tracking:
            yield tracking
    elif cfg.tracking.name == "tensorboard":
        with _tensorboard(cfg, directory, step) as tracking:
            yield tracking
    else:
        raise UserError(f"tracking.name={cfg.tracking.name}: choose none, wandb or tensorboard")


@contextlib.contextmanager
def _tensorboard(cfg: Config, directory: Path, step: int) -> Iterator[TensorBoardTracker]:
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, because importing it takes a second
    except ImportError as error:
        raise UserError("tracking=tensorboard needs TensorBoard: pip install tensorboard") from error
    with SummaryWriter(directory / TENSORBOARD, purge_step=step + 1 if step else None) as writer:
        yield TensorBoardTracker(writer, flat(cfg))


@contextlib.contextmanager
def _wandb(cfg: Config, directory: Path, run_id: str | None) -> Iterator[WandbTracker]:
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
