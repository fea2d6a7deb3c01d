"""Several at once: two runs in one directory, two sweeps in one folder, a report beside a sweep, a cache made twice.

One of two that cannot both be says so in one line; where both can, both end as either would alone.
"""

import itertools
import shutil
from pathlib import Path
from random import Random

from experiments import report
from tests.experiments.helpers import CHECKPOINTS, SMALL, TINY, assert_same, write_chats
from tests.torture.damaged import shown
from tests.torture.killed import Command, Ended


def campaign(count: int, folder: Path, seed: int = 0) -> list[str]:
    """Start `count` pairs; a line for each that got in each other's way."""
    chats = write_chats(folder)
    begin = [*TINY, "data=jsonl", f"data.path={chats}", *CHECKPOINTS, *SMALL, "lr=1e-2"]
    whole: dict[str, Path] = {}
    findings = []
    for number in range(count):
        rng, kind = Random(f"{seed} {number}"), ("runs", "sweeps", "report", "cache")[number % 4]
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        is_sweep = kind in ("sweeps", "report")
        what = ["+method=qlora", "seed=0", "dropout=0,0.1", "-m"] if is_sweep else ["+method=qdora"]
        arguments = [f"output_dir={out}", *begin, *what]
        if kind == "cache":
            shutil.rmtree(folder / "cache", ignore_errors=True)
            of_chats = ("data.path=", "data=jsonl")
            arguments = [one for one in arguments if not one.startswith(of_chats)] + ["data=docstrings"]
        found = _pair(kind, arguments, folder, rng)
        name = "sweep" if is_sweep else kind
        try:
            if name not in whole:
                alone = folder / f"whole-{name}" / "out"
                ended = Command([f"output_dir={alone}", *arguments[1:]], folder).end()
                assert ended.code == 0, ended.text
                whole[name] = alone
            found += _compared(out, whole[name])
        except (AssertionError, OSError, ValueError) as error:
            found.append(shown(error))
        findings += [f"at once {number} ({kind}): {one}" for one in found]
    return findings


def _pair(kind: str, arguments: list[str], folder: Path, rng: Random) -> list[str]:
    out = folder / "out"
    (folder / "two").mkdir(exist_ok=True)
    first = Command(arguments, folder)
    if kind == "report":
        return [*_reports(first, out), *_wrong(first.end())]
    first.process.join(rng.random())
    other = [f"output_dir={folder / 'two' / 'out'}"] if kind == "cache" else arguments[:1]
    second = Command([*other, *arguments[1:]], folder / "two", folder / "cache")
    ended = first.end(), second.end()
    if kind == "runs":
        if sorted(one.code for one in ended) != [0, 1]:
            return [f"exit codes {[one.code for one in ended]}: {[one.text[-300:] for one in ended]}"]
        told = max(ended, key=lambda one: one.code).text
        refusal = [line for line in told.splitlines() if line.startswith("error: ")]
        return [] if len(refusal) == 1 and "Traceback" not in told else [f"refused with {told[-400:]}"]
    shutil.rmtree(folder / "two" / "out", ignore_errors=True)
    return [*_wrong(ended[0]), *_wrong(ended[1])]


def _reports(running: Command, out: Path) -> list[str]:
    """Reports on the folder until the sweep has ended."""
    found = []
    for number in itertools.count():
        running.process.join(0.2)
        if running.process.exitcode is not None or number > 200:
            return found
        try:
            report.__main__.report(out)
        except Exception as error:
            if "no results" not in str(error):
                found.append(f"report {number}: {error!r}")


def _wrong(ended: Ended) -> list[str]:
    wrong = ended.code or ended.orphans or "Traceback" in ended.text
    return [f"exit code {ended.code}, left {ended.orphans}: {ended.text[-500:]}"] if wrong else []


def _compared(one: Path, other: Path) -> list[str]:
    if (other / "result.json").exists():
        assert_same(one, other)
        return []
    names = [sorted(path.parent.name for path in where.glob("*/result.json")) for where in (one, other)]
    assert names[0] == names[1], f"{names[0]} are there, not {names[1]}"
    for name in names[0]:
        assert_same(one / name, other / name)
    left = [path for path in one.rglob(".*") if path.name.startswith((".outcomes", ".lock")) and path.is_file()]
    return [f"left: {left}"] if left else []
