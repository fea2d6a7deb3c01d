"""The directory of a run: it belongs to one run at a time, and an earlier one's results stay unless they may go."""

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import UserError
from experiments.runs import checkpoints
from experiments.runs.model_files import ADAPTER, BASE, MODEL
from experiments.system import parallel
from experiments.system.files import METRICS, RESULT, SPECTRUM, claim, writable_dir
from modules.files.checked import SUMS

LOCK = ".lock"
INSTEAD = "choose another output_dir, or start anew with overwrite=true, which deletes it"


def new_directory(path: Path) -> Path:
    """Make the directory `path`, or `path`-2, -3 … if there is one: runs that start in one second get one each."""
    writable_dir(path.parent, "set output_dir to a folder")
    for number in itertools.count(1):
        new = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            new.mkdir()
            return new


@contextlib.contextmanager
def own_directory(path: Path, goes_on: bool, overwrite: bool) -> Iterator[None]:
    """Inside, the directory `path`, made if it is missing, belongs to this run. After an error it goes if it is empty.

    Args:
        goes_on: the run there is resumed.
        overwrite: results of an earlier run may go.

    Raises:
        UserError: another run is at work there, or results are there and may not go.
    """
    writable_dir(path, "set output_dir to a folder")
    try:
        with claim(path / LOCK) if parallel.is_main() else contextlib.nullcontext(True) as claimed:
            problem = None
            if not claimed:
                problem = f"another run is at work in {path}: choose another output_dir"
            elif not goes_on and not overwrite:
                problem = _earlier_run(path)
            if problem := parallel.agree(problem):
                raise UserError(problem)
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


def _earlier_run(path: Path) -> str | None:
    """What an earlier run has left that must not go unasked, and what to do; None: nothing."""
    if old := checkpoints.of_run(path):
        return f"{old[-1]} is there: go on from it with resume={path}, {INSTEAD}"
    left = [name for name in (RESULT, ADAPTER, MODEL) if (path / name).exists()]
    return f"{path / left[0]} of an earlier run is there: {INSTEAD}" if left else None


def clear(path: Path) -> None:
    """Delete what an earlier run wrote to `path`, and nothing else."""
    for name in (RESULT, METRICS, SPECTRUM, "loss.png", "samples.md", SUMS, ADAPTER, MODEL, BASE, checkpoints.FOLDER):
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
