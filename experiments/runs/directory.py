"""What a run leaves in its directory."""

from pathlib import Path

from experiments.runs import checkpoints
from experiments.runs.model_files import ADAPTER, BASE, MODEL
from experiments.runs.tracking import TENSORBOARD
from experiments.system.directory import INSTEAD, earlier_results
from experiments.system.files import EXPERTS, HELDOUT, METRICS, RESULT, SPECTRUM
from modules.files.checked import SUMS

FILES = (
    RESULT,
    METRICS,
    SPECTRUM,
    HELDOUT,
    EXPERTS,
    "loss.png",
    "samples.md",
    SUMS,
    ADAPTER,
    MODEL,
    BASE,
    checkpoints.FOLDER,
    TENSORBOARD,
)


def earlier_run(path: Path) -> str | None:
    """What an earlier run has left that must not go unasked, and how to go on; None: nothing."""
    if old := checkpoints.of_run(path):
        return f"{old[-1]} is there: go on from it with resume={path}, {INSTEAD}"
    return earlier_results(path, (RESULT, ADAPTER, MODEL))
