"""The answers to a study's questions: each comparison with its interval, corrected for how many there are."""

import itertools
import math
from dataclasses import dataclass

import numpy
from scipy import stats

from experiments.runs.groups import Run
from experiments.studies import comparisons
from experiments.studies.comparisons import Runs
from experiments.studies.definition import Question, Study
from experiments.studies.inference import LEVEL, holm
from experiments.studies.plan import SEARCH, Plan, Results, chosen_final

ALPHA = 1 - LEVEL
MEASURES = ("loss", "exact_match", "valid")  # loss in nats a token, the others as shares
FORGOTTEN = "forgotten"  # nats a token by which the loss on the second domain rose, at one gain on the task


@dataclass
class Answer:
    """The difference b - a of a measure on a task, or why there is none.

    Attributes:
        p: Holm's, over all comparisons of this measure in the question.
        visible: the smallest difference that the comparison sees with a power of 80 %, uncorrected.
        gain: of `forgotten`, the gain at which it was compared.
    """

    task: str
    a: str
    b: str
    measure: str
    why_not: str = ""
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    visible: float = math.nan
    seeds: int = 0
    samples: int = 0
    gain: float = math.nan

    @property
    def told_apart(self) -> bool:
        return self.p < ALPHA


def answers(study: Study, made: Plan, results: Results, question: Question) -> list[Answer]:
    """Of each measure, task and pair; pairs without the measure are left out."""
    found = []
    for measure in (FORGOTTEN,) if question.forgetting else MEASURES:
        family = []
        for task, (a, b) in itertools.product(question.tasks, question.compare):
            one = Answer(task, a, b, measure)
            if measure == FORGOTTEN:
                _forgotten(one, study, made, results, question)
            else:
                _measured(one, [runs_of(study, made, results, task, setting) for setting in (a, b)], results, question)
            family.append(one)
        if measure not in ("loss", FORGOTTEN):
            family = [one for one in family if one.seeds]
        known = [one for one in family if not one.why_not]
        for one, corrected in zip(known, holm([one.p for one in known])):
            one.p = corrected
        found += family
    return found


def runs_of(study: Study, made: Plan, results: Results, task: str, setting: str, factor: float = 1.0) -> Runs:
    """The final runs that are there, by seed."""
    jobs = chosen_final(study, made, task, setting, factor)
    return {job.cfg.seed: run for job in jobs if (run := results.of(job)) is not None}


def _measured(one: Answer, sides: list[Runs], results: Results, question: Question) -> None:
    a, b = sides
    common = len(a.keys() & b.keys())
    if common < 2:
        one.why_not = f"{common} seeds have both runs, and two are needed"
        return
    if question.equal_parameters and (why := comparisons.why_unequal(a, b)):
        one.why_not = why
        return
    try:
        found = comparisons.compare(a, b, results.samples_of, one.measure)
    except ValueError as error:
        one.why_not = str(error)
        return
    if found is not None:
        one.mean, one.low, one.high, one.p = found.mean, found.low, found.high, found.p
        one.visible, one.seeds, one.samples = found.visible(), found.variances.seeds, found.variances.samples


def path(study: Study, made: Plan, results: Results, question: Question, task: str, setting: str) -> dict:
    """By seed, (gain on the task, rise of the loss on the second domain) along rising learning rates."""
    factors = sorted(question.forgetting)
    along = [runs_of(study, made, results, task, setting, factor) for factor in factors]
    seeds = set.intersection(*(set(runs) for runs in along))
    return {seed: [_gain_and_rise(runs[seed]) for runs in along] for seed in sorted(seeds)}


def _gain_and_rise(run: Run) -> tuple[float, float]:
    return run.measures["loss_before"] - run.measures["loss_after"], run.measures["second_loss_rise"]


def common_gain(paths: list[dict]) -> float:
    """The largest gain that every path of every seed reaches; 0 if there is none."""
    most = [max(gain for gain, _ in points) for of_seed in paths for points in of_seed.values()]
    return max(0.0, min(most, default=0.0))


def _forgotten(one: Answer, study: Study, made: Plan, results: Results, question: Question) -> None:
    """The difference in what is forgotten where both have learned the same, over seeds: Student's t."""
    a, b = (path(study, made, results, question, one.task, setting) for setting in (one.a, one.b))
    seeds = sorted(a.keys() & b.keys())
    one.gain = common_gain([a, b])
    if len(seeds) < 2 or not one.gain:
        one.why_not = f"{len(seeds)} seeds have all runs, and two are needed" if len(seeds) < 2 else "one never gains"
        return
    d = numpy.array([comparisons.rise_at(b[s], one.gain) - comparisons.rise_at(a[s], one.gain) for s in seeds])
    error, freedom = d.std(ddof=1) / math.sqrt(len(d)), len(d) - 1
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    one.mean, one.low, one.high, one.seeds = float(d.mean()), float(d.mean() - half), float(d.mean() + half), len(d)
    one.p = float(2 * stats.t.sf(abs(one.mean) / error, freedom)) if error else float(one.mean == 0)


def tried(made: Plan, results: Results, task: str, setting: str) -> dict[int, dict[float, float]]:
    """The validation loss of each learning rate that was tried, by the steps of the round."""
    rounds: dict[int, dict[float, float]] = {}
    for job in made.jobs.values():
        if (job.stage, job.task, job.setting) == (SEARCH, task, setting) and (run := results.of(job)) is not None:
            rounds.setdefault(job.cfg.trainer.steps, {})[job.cfg.lr] = run.measures["loss_after"]
    return {steps: dict(sorted(losses.items())) for steps, losses in sorted(rounds.items())}


def untrained(made: Plan, results: Results, task: str) -> float:
    """The validation loss on a task before training, the highest if settings start with different ones."""
    jobs = (job for job in made.jobs.values() if (job.stage, job.task) == (SEARCH, task))
    return max((run.measures["loss_before"] for job in jobs if (run := results.of(job))), default=math.inf)


def search_runs(made: Plan, results: Results, question: Question) -> list[Run]:
    """The runs of the search that the question's settings had on its tasks."""
    wanted = set(itertools.product(question.tasks, question.settings))
    jobs = (job for job in made.jobs.values() if job.stage == SEARCH and (job.task, job.setting) in wanted)
    return [run for job in jobs if (run := results.of(job)) is not None]


def at_the_edge(study: Study, made: Plan, question: Question) -> list[str]:
    """Settings whose best learning rate is the lowest or the highest of the grid: a wider one may have a better."""
    found = []
    for task, setting in itertools.product(question.tasks, question.settings):
        best, grid = made.choices.get((task, setting)), study.grid(setting)
        if best in (grid[0], grid[-1]) and len(grid) > 1:
            found.append(f"{setting} on {task} ({best:g})")
    return found
