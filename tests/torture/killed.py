"""Runs and sweeps that are ended at a random moment, and gone on with until they have finished.

They must end as if nothing had happened: the same numbers and tensors bit for bit, no other files, no process left,
nothing left in the cache. A process is forked from one that has torch and transformers imported already, in a session
of its own: whatever is left of that session is an orphan.
"""

import atexit
import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from experiments import run
from experiments.runs.checkpoints import FOLDER, of_run
from experiments.system import signals
from modules.files.checked import SUMS
from tests.experiments.helpers import CHECKPOINTS, SMALL, TINY, repeatable_records, repeatable_result, write_chats
from tests.torture.damaged import shown

METHODS = ("full", "lora", "qlora", "dora", "qdora", "bitfit", "houlsby", "prefix_embed", "prefix_layer")
KINDS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGINT twice", "no memory")
LEFT = 2**19  # bytes that a process may have on top when it has no memory
LIMIT = 600  # seconds that a process may take on a busy machine
SECONDS_TO_END = 300  # on a busy machine, of what is left of a session after its first process has gone


@dataclass
class Ended:
    code: int  # minus the signal that it died of
    text: str
    orphans: list[str]


class Command:
    """`experiments.run` with these arguments in a process of its own."""

    def __init__(self, arguments: list[str], folder: Path, cache: Path | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.torture.killed"])
        self.log = folder / "printed.txt"
        ours, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(arguments, self.log, cache or folder / "cache", theirs))
        self.process.start()
        theirs.close()
        ours.recv()  # it begins
        self.began = time.monotonic()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def take_memory(self) -> None:
        """From now on there is next to none left for it."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            for line in lines:
                if line.startswith("VmData:"):
                    limit = int(line.split()[1]) * 1024 + LEFT
                    resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (limit, limit))

    def end(self) -> Ended:
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            _kill(members(self.process.pid))
            self.process.join()
            return Ended(1, f"it did not end in {LIMIT} s", [])
        waited, left = time.monotonic(), members(self.process.pid)
        while left and time.monotonic() - waited < SECONDS_TO_END:
            time.sleep(0.05)
            left = members(self.process.pid)
        _kill(left)
        return Ended(self.process.exitcode, self.log.read_text(), list(left.values()))


def stop_server() -> None:
    """End the process that commands are forked from, and the one that watches its semaphores, and wait for both."""
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


def _kill(processes: Iterable[int]) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _work(arguments: list[str], log: Path, cache: Path, ready: Connection) -> None:
    os.setsid()
    signals.end_with_parent(signal.SIGKILL)  # the campaign's
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # until the command has its own
    os.environ["QDORA_CACHE"] = str(cache)
    sys.argv = ["experiments.run", *arguments]
    ready.send(None)
    try:
        run.main()
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out


def members(session: int) -> dict[int, str]:
    """The processes of a session, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")[:100]
    return found


def campaign(count: int, folder: Path, seed: int = 0) -> list[str]:
    """End `count` runs, every tenth a sweep; a line for each that did not go on as if nothing had happened."""
    findings, whole, took = [], {}, {}
    chats = write_chats(folder)
    begin = [*TINY, "data=jsonl", f"data.path={chats}", *CHECKPOINTS, *SMALL, "trainer.keep_best=true", "lr=1e-2"]
    for number in range(count):
        rng = Random(f"{seed} {number}")
        is_sweep = number % 10 == 9
        method = "sweep" if is_sweep else METHODS[number % len(METHODS)]
        kind = KINDS[number // 10 % len(KINDS) if is_sweep else number % len(KINDS)]
        if is_sweep:  # two jobs over one packed base
            arguments = [f"output_dir={folder / 'out'}", *begin, "+method=qlora", "seed=0", "dropout=0,0.1", "-m"]
        else:
            dropout = ["dropout=0.1"] if method.endswith(("lora", "dora")) else []
            arguments = [f"output_dir={folder / 'out'}", *begin, f"+method={method}", *dropout]
        if method not in whole:
            whole[method] = folder / f"whole-{method}" / "out"  # the folder's name is in a sweep's configuration
            command = Command([f"output_dir={whole[method]}", *arguments[1:]], folder)
            ended = command.end()
            took[method] = time.monotonic() - command.began
            if ended.code or ended.orphans:
                return [*findings, f"killed: {method} does not run at all: {ended.code} {ended.text}"]
        told = f"killed {number} ({method}, {kind})"
        findings += [f"{told}: {found}" for found in _once(arguments, kind, rng.random() * took[method], folder, rng)]
        try:
            if is_sweep:
                for one in sorted(path.name for path in whole[method].iterdir() if not path.name.startswith(".")):
                    if (whole[method] / one).is_dir():
                        _same(folder / "out" / one, whole[method] / one)
            else:
                _same(folder / "out", whole[method])
        except (AssertionError, OSError, ValueError) as error:
            findings.append(f"{told}: not as if nothing had happened: {shown(error)}")
        if left := [path.name for path in (folder / "cache").glob(".base*")]:
            findings.append(f"{told}: left in the cache: {left}")
    return findings


def _once(arguments: list[str], kind: str, moment: float, folder: Path, rng: Random) -> list[str]:
    """End the command after `moment` seconds, then go on until it has finished; what was wrong on the way."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    findings = []
    command = Command(arguments, folder)
    command.process.join(moment)
    if kind == "no memory":
        command.take_memory()
        codes = (0, 1, -signal.SIGABRT)  # libraries in C++ and Rust may abort
    else:
        number = signal.Signals[kind.split()[0]]
        command.signal(number)
        codes = (0, -number, 128 + number)
    if kind.endswith("twice"):
        command.process.join(rng.random() / 2)
        command.signal(number)
    ended = command.end()
    if ended.orphans:
        findings.append(f"left running: {ended.orphans}")
    if "Traceback" in ended.text:
        findings.append(f"traceback: {ended.text.partition('Traceback')[2][:800]}")
    if ended.code not in codes or (ended.code == 1) != ("error: " in ended.text):
        findings.append(f"exit code {ended.code}: {ended.text[-300:]}")
    if "-m" in arguments:
        again = arguments
    elif (folder / "out" / "result.json").exists():
        return findings
    elif of_run(folder / "out"):
        again = [f"resume={folder / 'out'}"]
    else:
        again = [*arguments, "overwrite=true"]
    ended = Command(again, folder).end()
    if ended.code or ended.orphans or "Traceback" in ended.text:
        findings.append(f"going on: {ended.code} {ended.orphans} {ended.text[-600:]}")
    return findings


def _same(one: Path, other: Path) -> None:
    """Two runs have the same numbers and files. Left out are:

    - checkpoints that only one has. A signal adds one of the step that it came in, so an older one goes earlier.
    - hidden files, and the run's checksums.json: a run may be killed between result.json and these.
    """
    kept = [{path.name for path in (run / FOLDER).glob("*")} for run in (one, other)]
    alone = kept[0] ^ kept[1]
    assert kept[0] & kept[1] or not kept[1], "no checkpoint in common"
    assert repeatable_records(one) == repeatable_records(other), "other records"
    assert repeatable_result(one) == repeatable_result(other), "another result"
    files = [
        {
            str(path.relative_to(run)): path
            for path in run.rglob("*")
            if alone.isdisjoint(path.relative_to(run).parts) and not path.name.startswith(".") and path != run / SUMS
        }
        for run in (one, other)
    ]
    assert files[0].keys() == files[1].keys(), f"other files: {sorted(files[0].keys() ^ files[1].keys())}"
    for name, path in files[0].items():
        if path.suffix == ".safetensors":
            assert path.read_bytes() == files[1][name].read_bytes(), f"other tensors: {name}"
    for name in ("samples.md", "config.yaml"):
        assert (one / name).read_text().replace(str(one), str(other)) == (other / name).read_text(), f"another {name}"
