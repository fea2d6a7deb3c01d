"""A disk that is full, a quota, a directory that became read-only, too many open files: at a random write of a run.

One line says so, and all that was there before is intact: gone on with from its last checkpoint, or started anew, the
run ends with the very same numbers and files.
"""

import builtins
import contextlib
import errno
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import safetensors.torch
from hydra.core.global_hydra import GlobalHydra
from safetensors import SafetensorError

from experiments import run
from experiments.runs.checkpoints import of_run
from tests.experiments.helpers import CHECKPOINTS, SMALL, TINY, assert_same, write_chats
from tests.torture.damaged import shown

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EIO)
METHODS = ("qdora", "full", "lora", "houlsby")


class Faults:
    """Counts the writes below a folder; from write number `at` on they fail, `times` of them."""

    def __init__(self, folder: Path, at: int | None = None, number: int = errno.ENOSPC, times: int = 1):
        self.folder, self.at, self.number, self.times, self.seen = str(folder), at, number, times, 0

    def write(self, path: object) -> None:
        """One write to `path`, which may be a descriptor. Raises OSError if it is to fail."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not str(path).startswith(self.folder):
            return
        self.seen += 1
        if self.at is not None and self.at <= self.seen < self.at + self.times:
            raise OSError(self.number, os.strerror(self.number), str(path))


class _File:
    """A file that is open to be written, whose writes count."""

    def __init__(self, file: io.IOBase, path: object, faults: Faults):
        self._file, self._path, self._faults = file, path, faults

    def write(self, data):
        try:
            self._faults.write(self._path)
        except OSError:
            self._file.write(data[: len(data) // 2])  # as a disk that became full in the middle
            raise
        return self._file.write(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __iter__(self):
        return iter(self._file)


@contextlib.contextmanager
def failing(faults: Faults) -> Iterator[None]:
    """Inside, what writes asks `faults` first."""
    before = {(owner, name): getattr(owner, name) for owner, name in _writers()}

    def counted(original: Callable) -> Callable:
        def call(*args, **more):
            faults.write(args[-1] if original.__name__ in ("rename", "replace") else args[0])
            return original(*args, **more)

        return call

    def opened(original: Callable) -> Callable:
        def call(file, mode="r", *args, **more):
            if not set(mode) & set("wax+"):
                return original(file, mode, *args, **more)
            faults.write(file)
            return _File(original(file, mode, *args, **more), file, faults)

        return call

    def serialized(original: Callable) -> Callable:
        def call(tensors, filename, *args, **more):
            try:
                faults.write(filename)
            except OSError as error:  # as the library words it
                Path(filename).write_bytes(b"half")
                told = f"I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(f"Error while serializing: {told}") from error
            return original(tensors, filename, *args, **more)

        return call

    for (owner, name), original in before.items():
        wrap = {"open": opened, "serialize_file": serialized}.get(name, counted) if owner is not os else counted
        setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        for (owner, name), original in before.items():
            setattr(owner, name, original)


def _writers() -> list[tuple[object, str]]:
    calls = [(os, name) for name in ("rename", "replace", "mkdir", "fsync")]
    return [*calls, (io, "open"), (builtins, "open"), (safetensors.torch, "serialize_file")]


def start(arguments: list[str]) -> tuple[int, str]:
    """Run experiments.run in this process; returns (exit code, what it printed)."""
    GlobalHydra.instance().clear()
    before, printed = (sys.argv, sys.stdout, sys.stderr), io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    sys.argv, sys.stdout, sys.stderr = ["experiments.run", *arguments], printed, printed
    code: object = 0
    try:
        run.main()
    except SystemExit as end:
        code = end.code
    except Exception as error:  # a command ends in SystemExit: this would be a traceback
        code = f"Traceback: {type(error).__name__}: {error}"
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    text = printed.buffer.getvalue().decode()
    return (1, f"{text}{code}\n") if isinstance(code, str) else (code or 0, text)


def campaign(count: int, folder: Path, seed: int = 0) -> list[str]:
    """Let a write of `count` runs fail; a line for each that did not end in one line, or lost anything."""
    findings, whole, writes = [], {}, {}
    begin = [*TINY, "data=jsonl", f"data.path={write_chats(folder)}", *CHECKPOINTS, *SMALL, "lr=1e-2"]
    out = folder / "out"
    for number in range(count):
        rng, method = Random(f"{seed} {number}"), METHODS[number % len(METHODS)]
        arguments = [*begin, f"+method={method}", f"output_dir={out}"]
        if method not in whole:
            whole[method] = folder / f"whole-{method}"
            faults = Faults(whole[method])
            with failing(faults):
                code, text = start([*arguments[:-1], f"output_dir={whole[method]}"])
            if code:
                return [*findings, f"full: {method} does not run at all: {text}"]
            writes[method] = faults.seen
        at, kind = rng.randint(1, writes[method]), rng.choice(ERRORS)
        faults = Faults(out, at, kind, times=rng.choice((1, 10**9)))
        with failing(faults):
            code, text = start(arguments)
        told = f"full {number} ({method}, write {at} of {writes[method]}, {os.strerror(kind)}, {faults.times} times)"
        findings += [f"{told}: {found}" for found in _judge(code, text, out)]
        if not (out / "result.json").exists():
            again = [f"resume={out}"] if of_run(out) else [*arguments, "overwrite=true"]
            code, text = start(again)
            if code:
                findings.append(f"{told}: does not go on: {text[-500:]}")
        try:
            assert_same(out, whole[method])
        except (AssertionError, OSError) as error:
            findings.append(f"{told}: other results: {shown(error)}")
        shutil.rmtree(out, ignore_errors=True)
    return findings


def _judge(code: int, text: str, out: Path) -> list[str]:
    found = []
    if "Traceback" in text:
        found.append(f"traceback: {text[-700:]}")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code and len(errors) != 1:
        found.append(f"{len(errors)} lines of errors: {text[-300:]}")
    if not code and not (out / "result.json").exists():
        found.append("exit code 0 without a result")
    if left := [path.name for path in out.rglob(".*") if path.name != ".lock"]:
        found.append(f"left there: {left}")
    return found
