"""Folders for files, and writes that leave no half file."""

import contextlib
import csv
import errno
import fcntl
import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from experiments.errors import UserError

if TYPE_CHECKING:  # importing it takes time and memory
    from matplotlib.figure import Figure

RESULT, METRICS, SPECTRUM, EXPERTS = "result.json", "metrics.jsonl", "spectrum.csv", "experts.csv"  # of a run
HELDOUT = "heldout.csv"  # likewise
STUDY = "study.yaml"  # the definition of a study, beside its runs
PARTIALS = ".*.[0-9]*.partial"  # half-written files and directories of `write_atomically` and `directory_atomically`
NAME_LENGTH = 120  # of the varied keys in the name of a run's directory; a file name may have 255 bytes
PROJECT_ROOT = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """The folder for files that can be made again: `$QDORA_CACHE`, or `.cache/` in the project. Created if missing."""
    return writable_dir(Path(os.environ.get("QDORA_CACHE") or PROJECT_ROOT / ".cache"), "set QDORA_CACHE to a folder")


def writable_dir(path: Path, instead: str) -> Path:
    """`path`, created if missing.

    Raises:
        UserError: it cannot be created or written to; the message ends with `instead`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): {instead} that can be written") from error
    return path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write the content under a temporary name, then rename: whoever reads `path` never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_figure(path: Path, figure: "Figure", dpi: int = 130) -> None:
    """Write a figure of matplotlib as PNG, likewise."""
    image = io.BytesIO()
    figure.savefig(image, dpi=dpi, format="png")
    write_atomically(path, image.getvalue())


def sync(path: Path) -> None:
    """Have a file or a directory on the disk: after a loss of power a new name must not stand for old bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_csv(columns: Sequence[str], rows: Iterable[dict]) -> str:
    """The rows below a line of titles; floats with six digits."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    return file.getvalue()


@contextlib.contextmanager
def directory_atomically(path: Path) -> Iterator[Path]:
    """An empty directory to fill. When the block ends well it gets the name `path` and replaces a directory there.

    Raises:
        OSError: the disk is full; the message names `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            sync(entry)
        if path.exists():
            delete_directory(path)
        os.rename(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def delete_directory(path: Path) -> None:
    """Delete a directory. It is renamed first, so that nobody takes the rest of it for the whole."""
    gone = path.with_name(f".{path.name}.{os.getpid()}.deleted.partial")
    os.rename(path, gone)
    shutil.rmtree(gone)


@contextlib.contextmanager
def claim(lock: Path) -> Iterator[bool]:
    """Whether the block has the file `lock` to itself, which is gone afterwards. The system releases the lock of a
    process that dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(lock)
    try:
        yield file is not None
    finally:
        if file is not None:
            lock.unlink(missing_ok=True)
            file.close()


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[bool]:
    """Inside, no other process is: the next one waits. False: the file system has no locks."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked


def is_free(lock: Path) -> bool:
    """Whether no process has the file `lock` to itself; False where the file system cannot tell."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def delete_partials(path: Path) -> None:
    """Delete the directories that processes which were killed have left on the way to `path`."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _locked(lock: Path) -> io.TextIOWrapper | None:
    """The file, opened and locked; None: another process has it."""
    while True:
        file = lock.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            reason = f"its file system has no locks ({error.strerror}), so see to it that nothing else writes there"
            print(f"note: {lock.parent}: {reason}", file=sys.stderr)
            return file
        with contextlib.suppress(FileNotFoundError):  # whoever had it may have deleted it just now
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()
