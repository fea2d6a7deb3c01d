"""The runs of a study: which there are, given the results so far, and which of them are missing.

What is run next depends on results: a round of the search on the round before, final runs on the search, the number of
seeds on the pilot. So the plan is made again from the files whenever something has been added.
"""

import contextlib
import itertools
import statistics
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from experiments.config import Config
from experiments.runs import heldout
from experiments.runs.groups import Run, read_run
from experiments.runs.heldout import Samples
from experiments.studies import comparisons
from experiments.studies.definition import Question, Study
from experiments.system.files import RESULT

SEARCH, FINAL = "search", "final"


@dataclass(frozen=True)
class Job:
    """A run of a study. `factor`: its learning rate over the best one."""

    stage: str
    question: str  # the first that needs it
    task: str
    setting: str
    cfg: Config = field(compare=False)
    identity: str
    factor: float = 1.0

    @property
    def name(self) -> str:
        cfg = self.cfg
        parts = [
            self.stage,
            self.task,
            self.setting,
            f"lr={cfg.lr:g}",
            f"seed={cfg.seed}",
            f"steps={cfg.trainer.steps}",
        ]
        return ",".join(parts)


class Results:
    """The results in a folder, by their run's hash."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[str, Run] = {}
        self.samples: dict[str, Samples] = {}

    def refresh(self) -> None:
        for path in sorted(self.folder.glob(f"*_*/{RESULT}")):
            if path.parent.name.rpartition("_")[2] not in self.runs:
                with contextlib.suppress(OSError, ValueError):  # damaged, or not a run's: it counts as missing
                    run = read_run(path, self.folder)
                    self.samples[run.identity] = heldout.read(path.parent)["heldout"]
                    self.runs[run.identity] = run

    def of(self, job: Job) -> Run | None:
        return self.runs.get(job.identity)

    def samples_of(self, run: Run) -> Samples:
        """The measures of its held-out samples."""
        return self.samples[run.identity]


@dataclass
class Plan:
    """Attributes:
    jobs: all that are known, by hash, those of the first question first.
    later: how many will come of a stage, task, setting, number of steps and factor, and for which question. Which ones
        cannot be said yet.
    choices: the learning rate of each task and setting whose search has ended.
    lost: tasks and settings whose search runs have all failed.
    seeds: of the final runs of each task and setting, as far as they are known.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    later: dict[tuple[str, str, str, int, float], tuple[str, int]] = field(default_factory=dict)
    choices: dict[tuple[str, str], float] = field(default_factory=dict)
    lost: set[tuple[str, str]] = field(default_factory=set)
    seeds: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, jobs: list[Job]) -> list[Job]:
        """The jobs, each under its hash as the first question has it."""
        return [self.jobs.setdefault(job.identity, job) for job in jobs]

    def missing(self, results: Results) -> list[Job]:
        return [job for job in self.jobs.values() if results.of(job) is None]


def plan(study: Study, results: Results, failed: Collection[str] = ()) -> Plan:
    """Args:
    failed: hashes of runs that have failed and are not waited for; as search runs they lose.
    """
    made = Plan()
    for name, question in study.questions.items():
        for task in question.tasks:
            for setting in question.settings:
                if (task, setting) not in made.choices:
                    _add_search(made, study, results, failed, (name, task, setting))
        for task in question.tasks:
            _add_final(made, study, results, failed, name, task)
    return made


def _add_search(made: Plan, study: Study, results: Results, failed: Collection[str], of: tuple[str, str, str]) -> None:
    name, task, setting = of
    rates, search = study.grid(setting), study.search
    for number, steps in enumerate(search.steps):
        runs = [study.run(task, setting, lr, search.seed, steps, search=True) for lr in rates]
        jobs = made.add([Job(SEARCH, name, task, setting, *run) for run in runs])
        if any(results.of(job) is None and job.identity not in failed for job in jobs):
            for keep, later in zip(search.keep[number:], search.steps[number + 1 :]):
                made.later.setdefault((SEARCH, task, setting, later, 1.0), (name, keep))
            return
        done = {job.cfg.lr: run for job in jobs if (run := results.of(job)) is not None}
        if not done:
            made.lost.add((task, setting))
            return
        if number < len(search.keep):
            rates = sorted(done, key=lambda lr: done[lr].measures["loss_after"])[: search.keep[number]]
    level, reference = comparisons.level(done, results.samples_of), study.reference_of(task, setting)
    if reference is None or (task, reference) in made.choices.keys() | made.lost:
        shared = made.choices.get((task, reference))
        made.choices[task, setting] = shared if shared in level else level[0]


def _add_final(made: Plan, study: Study, results: Results, failed: Collection[str], name: str, task: str) -> None:
    """The final runs of a question on a task: the pilot's seeds, and once these are done as many as are needed."""
    question, steps = study.questions[name], study.search.steps[-1]
    factors = question.forgetting or [1.0]

    def jobs(setting: str, seeds: int) -> list[Job]:
        best = made.choices[task, setting]
        return [
            Job(FINAL, name, task, setting, *study.run(task, setting, factor * best, seed, steps, False), factor)
            for seed in range(seeds)
            for factor in factors
        ]

    ready = [setting for setting in question.settings if (task, setting) in made.choices]
    pilot = {setting: made.add(jobs(setting, study.size.pilot)) for setting in ready}
    done = len(ready) == len(question.settings) and all(
        results.of(job) is not None or job.identity in failed for found in pilot.values() for job in found
    )
    if not done:
        for setting, factor in itertools.product(question.settings, factors):
            if setting not in ready:
                made.later.setdefault((FINAL, task, setting, steps, factor), (name, study.size.pilot))
        return
    seeds = study.size.pilot if question.forgetting else _seeds_needed(study, results, question, pilot)
    for setting in ready:
        made.add(jobs(setting, seeds))
        made.seeds[task, setting] = max(seeds, made.seeds.get((task, setting), 0))


def _seeds_needed(study: Study, results: Results, question: Question, pilot: dict[str, list[Job]]) -> int:
    """So many that each comparison sees the differences that the study is about, or as many as it may have."""
    runs = {s: {job.cfg.seed: run for job in jobs if (run := results.of(job))} for s, jobs in pilot.items()}
    found = [
        comparisons.needed(runs[a], runs[b], results.samples_of, measure, getattr(study.size, measure), study.size.most)
        for a, b in question.compare
        for measure in ("loss", "exact_match")
    ]
    return max(study.size.pilot, *found)


def chosen_final(study: Study, made: Plan, task: str, setting: str, factor: float = 1.0) -> list[Job]:
    """The final jobs of a setting that the plan has, by seed."""
    if (task, setting) not in made.choices:
        return []
    lr, steps, found = factor * made.choices[task, setting], study.search.steps[-1], []
    for seed in range(study.size.most):
        _, identity = study.run(task, setting, lr, seed, steps, False)
        found += [made.jobs[identity]] if identity in made.jobs else []
    return found


@dataclass
class Pace:
    """Seconds of runs, measured on those that are there, or as the definition has them."""

    step: dict[str, float]  # of a task
    rest: dict[tuple[str, str], float]  # of a stage and a task

    def seconds(self, stage: str, task: str, steps: int) -> float:
        return steps * self.step[task] + self.rest[stage, task]


def pace(study: Study, made: Plan, results: Results) -> tuple[Pace, int]:
    """The pace, and how many runs it was measured on."""
    given, done = study.definition.pace, [(job, run) for job in made.jobs.values() if (run := results.of(job))]

    def usual(values: list[float], default: float) -> float:  # a run beside other work may take ten times as long
        return statistics.median(values) if values else default

    def step(run: Run) -> float:
        return run.measures["train_seconds"] / run.config["trainer.steps"]

    every = usual([step(run) for _, run in done], given.step)
    steps, rest = {}, {}
    for task in study.definition.tasks:
        steps[task] = usual([step(run) for job, run in done if job.task == task], every)
        for stage, default in ((SEARCH, given.search), (FINAL, given.final)):
            own = [run.measures for job, run in done if (job.stage, job.task) == (stage, task)]
            rest[stage, task] = usual([m["total_seconds"] - m["train_seconds"] for m in own], default)
    return Pace(steps, rest), len(done)
