"""Run stages, each side in a process of its own; then hold the figures to the targets."""

import argparse
import datetime
import importlib.util
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

from experiments.bench.gpu import report, worker
from experiments.bench.gpu.report import Results
from experiments.bench.gpu.side import Job
from experiments.bench.gpu.stages import HOST, LINEAR, PEAK, STEP, Case, Stage
from experiments.bench.process import Process, Silent
from experiments.errors import UserError
from experiments.system import machine
from experiments.system.cli import CONF

CHECKED = 6  # steps whose losses are compared, from the first; the last of them captures graphs
STEPS = 20  # timed
AT_ONCE = 4  # steps of a side before it is another's turn
BUILDING, ANSWERING = 100, 40  # seconds that a side may take to start or build, and for anything else
PROMPT, NEW, BATCHES = 512, 32, (1, 16)  # tokens and rows of decoding
EAGER = (256, 16)  # size and rank of the linear that is called eagerly
NEEDS = {
    "ours": (),
    "peft": ("peft", "bitsandbytes"),
    "liger": ("liger_kernel", "peft", "bitsandbytes"),
    "unsloth": ("unsloth",),
}


class Sides:
    """The processes of a stage. One that gives no answer in time, or fails, is ended; the next case has a new one.

    Args:
        unsloth: where it is, if not in this environment.
    """

    def __init__(self, results: Results, deadline: float, unsloth: Path | None):
        self.results, self.deadline, self.unsloth = results, deadline, unsloth
        self.processes: dict[str, Process] = {}

    def start(self, case: Case | str, names: Iterable[str]) -> None:
        """Start those of `names` that are not there, all at once."""
        new = [name for name in names if name not in self.processes and self._is_installed(name)]
        for name in new:
            path = [self.unsloth] if name == "unsloth" and self.unsloth else []
            self.processes[name] = Process(name, Path(worker.__file__), name, name == "ours", path)
        for name in new:
            if versions := self.receive(case, name, BUILDING):
                self.results.versions[name] = versions

    def _is_installed(self, name: str) -> bool:
        if name == "unsloth" and self.unsloth:
            return True
        missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
        if missing:
            self.results.note(f"{name} is left out: {missing[0]} is not installed")
        return not missing

    def ask(self, case: Case | str, name: str, *request, seconds: float = ANSWERING):
        """The answer of a side; None if there is none, for a reason that is told."""
        if name not in self.processes:
            return None
        self.processes[name].send(*request)
        return self.receive(case, name, seconds)

    def receive(self, case: Case | str, name: str, seconds: float):
        try:
            answer, error = self.processes[name].receive(max(1.0, min(seconds, self.deadline - time.monotonic())))
        except (Silent, UserError) as reason:
            answer, error = None, str(reason)
        if error is not None:
            self.results.failed(case, name, error)
            self.processes.pop(name).kill()  # after an error of CUDA nothing works, after others memory may be held
        return answer

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()


def run(options: argparse.Namespace) -> None:
    device = torch.device("cuda")
    results = Results(torch.cuda.get_device_name(device), str(device))
    print(f"{machine.describe(device, torch.bfloat16)}: at most {sum(s.limit for s in options.stages)} s")
    path = options.csv or Path("outputs") / f"bench_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.csv"
    picture = options.plot or path.with_suffix(".png")
    for stage in options.stages:
        print(f"\n== {stage.name}: at most {stage.limit} s", flush=True)
        run_stage(stage, results, options.steps or STEPS, options.unsloth)
        report.write(path, results)  # now: a later stage may be the last
    print(f"\n{results.card}; {results.told_versions()}", *results.notes, "", sep="\n")
    print(*report.table(results), sep="\n")
    report.plot(picture, results)
    print("\nWritten:", path, picture, sep="\n  ")


def run_stage(stage: Stage, results: Results, steps: int, unsloth: Path | None = None) -> None:
    deadline = time.monotonic() + stage.limit
    sides = Sides(results, deadline, unsloth)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            sides.start(stage.name, dict.fromkeys(side for case in stage.cases for side in case.sides))
            for case in stage.cases:
                if time.monotonic() > deadline:
                    results.note(f"{case} is left out: the {stage.limit} s of {stage.name} are over")
                    continue
                measure(case, sides, results, steps, Path(scratch))
            if stage.linear:
                _eager_linear(sides, results)
    finally:
        sides.close()


def architecture_of(preset: str) -> dict:
    """The content of its config.json, without defaults."""
    presets = {path.stem: OmegaConf.load(path) for path in Path(CONF, "model").glob("*.yaml")}
    shapes = {name: OmegaConf.to_container(cfg.architecture) for name, cfg in presets.items() if "architecture" in cfg}
    if preset not in shapes:
        raise UserError(f"no preset {preset}: choose {', '.join(sorted(shapes))}")
    return shapes[preset]


def job_of(case: Case, device: str) -> dict:
    """The fields of a Job."""
    architecture = architecture_of(case.preset)
    if case.layers is not None:
        architecture["num_hidden_layers"] = case.layers
    return asdict(
        Job(
            method=case.method,
            rank=case.rank,
            architecture=architecture,
            batch=case.batch,
            length=case.length,
            checkpointing=case.checkpointing,
            dtype="bfloat16" if device == "cuda" else "float32",
            device=device,
        )
    )


def measure(case: Case, sides: Sides, results: Results, steps: int, scratch: Path) -> None:
    """All figures of a case, of its sides in turn."""
    for names in [(name,) for name in case.sides] if case.alone else [case.sides]:
        _measure(case, names, sides, results, steps, scratch)
    results.compare(case)
    results.show(case)


def _measure(case: Case, names: Sequence[str], sides: Sides, results: Results, steps: int, scratch: Path) -> None:
    """Build the case on some sides; take the losses of the first steps, time more in turn, then the rest."""
    job = job_of(case, results.device)
    batch = tokens(job, case.batch, case.length)
    present = _build(case, names, job, sides, scratch)
    for name in list(present):
        told = sides.ask(case, name, "steps", batch, CHECKED, seconds=BUILDING)  # kernels are compiled
        if told is None:
            present.remove(name)
        else:
            results.losses[case, name] = told[0]
    times: dict[str, list[float]] = {name: [] for name in present}
    while present and len(times[present[0]]) < steps:
        for name in list(present):
            told = sides.ask(case, name, "steps", batch, min(AT_ONCE, steps - len(times[name])))
            if told is None:
                present.remove(name)
            else:
                times[name] += told[1]
    for name in list(present):
        results.add(case, name, STEP, [1e3 * t for t in times[name]])
        if peak := sides.ask(case, name, "peak"):
            results.add(case, name, PEAK, [peak / 1e9])
        if busy := sides.ask(case, name, "busy", batch):
            results.busy(case, name, busy)
    rows = case.batch * case.length
    if case.products and "ours" in present and (seconds := sides.ask(case, "ours", "products", rows)):
        results.add(case, "ours", "products_ms", [1e3 * seconds])
    if case.decodes:
        _decode(case, job, sides, results, present)
    for name in names:
        sides.ask(case, name, "free")


def _build(case: Case, names: Sequence[str], job: dict, sides: Sides, scratch: Path) -> list[str]:
    """Build on some sides at once; the names of those that have."""
    sides.start(case, names)
    if "unsloth" in names and "unsloth" in sides.processes:
        directory = scratch / f"{case.preset}-{case.layers}"
        if not directory.exists():
            sides.ask(case, "ours", "save", job, str(directory), seconds=BUILDING)
            sides.ask(case, "ours", "free")
        job = job | {"directory": str(directory)}
    asked = [name for name in names if name in sides.processes]
    for name in asked:
        sides.processes[name].send("build", job)
    return [name for name in asked if sides.receive(case, name, BUILDING)]


def _decode(case: Case, job: dict, sides: Sides, results: Results, present: Sequence[str]) -> None:
    """Read prompts and write after them, one row and sixteen, one side after the other and once more."""
    for rows in BATCHES:
        prompts = tokens(job, rows, PROMPT)
        for name in present:
            told = [sides.ask(case, name, "decode", prompts, NEW) for _ in range(2)]
            if None in told:
                continue
            results.add(case, name, f"prefill_{rows}", [1e3 * prefill for prefill, _, _ in told])
            results.add(case, name, f"decode_{rows}", [rows / token for _, token, _ in told])
            results.first_tokens[case, name, rows] = told[0][2]


def _eager_linear(sides: Sides, results: Results) -> None:
    sides.start(LINEAR, ["ours"])
    told = sides.ask(LINEAR, "ours", "eager_linear", results.device, *EAGER)
    for name, seconds in zip(("ours", "torch"), told or ()):
        results.add(LINEAR, name, HOST, [1e6 * t for t in seconds])
    results.show(LINEAR)


def tokens(job: dict, rows: int, length: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(rows * length)
    return torch.randint(job["architecture"]["vocab_size"], (rows, length), generator=draw).tolist()
