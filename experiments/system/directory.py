"""The directory that a command writes to: it belongs to one process at a time, and earlier results stay unless they may
go."""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from experiments.errors import UserError
from experiments.system import parallel
from experiments.system.cli import is_given
from experiments.system.files import PARTIALS, claim, writable_dir

LOCK = ".lock"
INSTEAD = "choose another output_dir, or start anew with overwrite=true, which deletes it"


class WritesResults(Protocol):
    """A configuration of a command that writes to a directory."""

    output_dir: str
    overwrite: bool


def new_directory(path: Path) -> Path:
    """Make the directory `path`, or `path`-2, -3 … if there is one: runs that start in one second get one each."""
    writable_dir(path.parent, "set output_dir to a folder")
    for number in itertools.count(1):
        new = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            new.mkdir()
            return new


@contextlib.contextmanager
def own_directory(path: Path, problem: Callable[[], str | None]) -> Iterator[None]:
    """Inside, the directory `path`, made if it is missing, belongs to this run. After an error it goes if it is empty.
    Half-written files and directories of killed processes go first.

    Args:
        problem: why the run must not begin there, once the directory is its own; None: it may.

    Raises:
        UserError: another run is at work there, or there is a problem.
    """
    writable_dir(path, "set output_dir to a folder")
    try:
        with claim(path / LOCK) if parallel.is_main() else contextlib.nullcontext(True) as claimed:
            found = problem() if claimed else f"another run is at work in {path}: choose another output_dir"
            if found := parallel.agree(found):
                raise UserError(found)
            if parallel.is_main():
                clear(path, (PARTIALS,))
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


@contextlib.contextmanager
def results_directory(cfg: WritesResults, results: Sequence[str]) -> Iterator[None]:
    """Inside, `cfg.output_dir` belongs to this command; one that the command line does not name becomes a new one.

    Args:
        results: the names of the files that the command writes, which may stand for several: map*.yaml. It deletes
            those of an earlier call with `clear` when it has its own.

    Raises:
        UserError: another process is at work there, or such files are there and cfg.overwrite is not set.
    """
    if not is_given("output_dir"):
        cfg.output_dir = str(new_directory(Path(cfg.output_dir)))
    path = Path(cfg.output_dir)
    with own_directory(path, lambda: None if cfg.overwrite else earlier_results(path, results)):
        yield


def earlier_results(path: Path, results: Iterable[str]) -> str | None:
    """Which of `results` is in `path`, and how to go on; None: none of them."""
    left = [found for name in results for found in sorted(path.glob(name))]
    return f"{left[0]} of an earlier run is there: {INSTEAD}" if left else None


def clear(path: Path, results: Iterable[str]) -> None:
    """Delete `results` from `path`, and nothing else."""
    for found in [found for name in results for found in path.glob(name)]:
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink()
