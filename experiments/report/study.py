"""The report of a study: for each question a sentence that its numbers support, a table and pictures."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.report.page import Section, Table
from experiments.report.study_plots import by_rank, curves_of_rates, differences, forgetting
from experiments.studies import definition
from experiments.studies.answers import (
    FORGOTTEN,
    Answer,
    answers,
    at_the_edge,
    common_gain,
    path,
    runs_of,
    search_runs,
    tried,
    untrained,
)
from experiments.studies.definition import Question, Study
from experiments.studies.inference import POWER
from experiments.studies.plan import Plan, Results, plan
from experiments.system.files import STUDY

NAMED = 2  # so many comparisons that tell nothing apart are named in a sentence; more are counted


@dataclass(frozen=True)
class Words:
    """How a measure is told: its name, the words for more and less of it, the form of a difference."""

    name: str
    more: str
    less: str
    form: Callable[[float], str]


def _nats(value: float) -> str:
    return f"{value:.4f} nats a token"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


WORDS = {
    "loss": Words("loss", "higher", "lower", _nats),
    "exact_match": Words("right answers", "more", "fewer", _points),
    "valid": Words("valid answers", "more", "fewer", _points),
    FORGOTTEN: Words("forgetting at equal gain", "more", "less", _nats),
}


def sections(folder: Path) -> list[Section]:
    """The report's sections on a folder of runs that has a study's definition.

    Raises:
        UserError: the definition cannot be read.
    """
    study, results = definition.read(str(folder / STUDY)), Results(folder)
    results.refresh()
    made = plan(study, results)
    missing = len(made.missing(results))
    first = Section(study.definition.about, [f"{len(results.runs)} runs. Every run is a row of runs.csv."])
    if missing or made.later:
        first.lines.append(f"The study is not done: {missing} known runs are missing, so answers may change.")
    first.lines += [
        f"Each setting has the learning rate that was best for it on each task: the lowest loss on validation samples "
        f"after {study.search.steps[-1]} steps, found by successive halving with a seed of its own. Of rates whose "
        "loss is within a standard error of that it has its reference's, or else the lowest. Comparisons are on "
        "held-out samples that no search has seen. Runs of two settings share seeds, the order of the data and the "
        "samples.",
        "Intervals are of 95 %, by a bootstrap over seeds and samples; p is Holm's, over all comparisons of a measure "
        "in a question. What a comparison could see is the smallest difference that it finds with a power of "
        f"{POWER:.0%}.",
        f"By {', '.join(commits(results))}.",
    ]
    parts = [_section(study, made, results, name, question) for name, question in study.questions.items()]
    return [first, *parts]


def commits(results: Results) -> list[str]:
    found = {run.about["commit"] for run in results.runs.values()}
    return sorted({f"commit {commit[:12]}{commit[40:]}" for commit in found}) or ["no run yet"]


def _section(study: Study, made: Plan, results: Results, name: str, question: Question) -> Section:
    found = answers(study, made, results, question)
    section = Section(question.asks)
    for measure in dict.fromkeys(one.measure for one in found):
        section.lines.append(f"- {sentence([one for one in found if one.measure == measure])}")
    if edges := at_the_edge(study, made, question):
        section.lines.append(f"- The best learning rate is at the edge of the grid: {', '.join(edges)}.")
    section.lines += [f"- Not compared: {told_pair(one)}: {one.why_not}." for one in found if one.why_not]
    tables = [_answers_table(found), _settings_table(study, made, results, question)]
    section.tables = [table for table in tables if table.rows]
    by_task = {
        task: [list(runs_of(study, made, results, task, setting).values()) for setting in question.settings]
        for task in question.tasks
    }
    runs = [run for settings in by_task.values() for members in settings for run in members]
    if any(one.seeds for one in found):
        section.pictures[f"{name}-differences.png"] = differences(question.asks, found, runs)
    if (picture := by_rank(question.asks, by_task)) is not None:
        section.pictures[f"{name}-ranks.png"] = picture
    if question.forgetting:
        paths = {
            task: {setting: path(study, made, results, question, task, setting) for setting in question.settings}
            for task in question.tasks
        }
        gains = {task: common_gain(list(of_setting.values())) for task, of_setting in paths.items()}
        if any(of_seed for of_setting in paths.values() for of_seed in of_setting.values()):
            section.pictures[f"{name}-forgetting.png"] = forgetting(question.asks, paths, gains, runs)
    rounds = {
        task: {setting: tried(made, results, task, setting) for setting in question.settings} for task in question.tasks
    }
    if any(found for of_setting in rounds.values() for found in of_setting.values()):
        searched = search_runs(made, results, question)
        before = {task: untrained(made, results, task) for task in question.tasks}
        picture = curves_of_rates(question.asks, rounds, made.choices, before, searched)
        section.pictures[f"{name}-learning-rates.png"] = picture
    return section


def sentence(found: list[Answer]) -> str:
    """What the comparisons of one measure say, in one sentence."""
    words, known = WORDS[found[0].measure], [one for one in found if not one.why_not]
    if not known:
        return f"Nothing can be said about {words.name} yet."
    apart = [one for one in known if one.told_apart]
    parts = [f"{told_pair(one)} by {_told(one)}" for one in apart]
    level = [one for one in known if not one.told_apart]
    if len(level) <= NAMED:
        parts += [f"{one.a} and {one.b} on {one.task} are not told apart: {_told(one)}" for one in level]
    else:
        for task in dict.fromkeys(one.task for one in level):
            alike = [one for one in level if one.task == task]
            of_all = sum(one.task == task for one in known)
            most = words.form(max(max(-one.low, one.high) for one in alike))
            which = f"{len(alike)} of {of_all} comparisons on {task} find no difference"
            parts.append(f"{which}, and no 95 % interval goes beyond {most}")
    head = words.name[0].upper() + words.name[1:]
    return f"**{head}**: {'; '.join(parts)}."


def told_pair(one: Answer) -> str:
    """The two settings and the task, with the direction of the difference where there is one."""
    words = WORDS[one.measure]
    if one.why_not:
        return f"{one.b} − {one.a} on {one.task}"
    direction = words.less if one.mean < 0 else words.more
    kind = {"loss": f"has a {direction} loss than", FORGOTTEN: f"forgets {direction} than"}
    return f"{one.b} {kind.get(one.measure, f'has {direction} {words.name} than')} {one.a} on {one.task}"


def _told(one: Answer) -> str:
    form = WORDS[one.measure].form
    size = form(abs(one.mean)) if one.told_apart else form(one.mean)
    seen = "" if math.isnan(one.visible) else f", could see {form(one.visible)}"
    return f"{size} (95 % {_interval(one)}, p {_p(one.p)}{'' if one.told_apart else seen})"


def _scale(one: Answer) -> int:
    return 1 if one.measure in ("loss", FORGOTTEN) else 100


def _digits(one: Answer) -> int:
    return 4 if one.measure in ("loss", FORGOTTEN) else 1


def _interval(one: Answer) -> str:
    scale, digits = _scale(one), _digits(one)
    return f"{one.low * scale:+.{digits}f} to {one.high * scale:+.{digits}f}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _answers_table(found: list[Answer]) -> Table:
    rows = [
        [
            f"{one.b} − {one.a}",
            one.task,
            WORDS[one.measure].name,
            f"{one.mean * _scale(one):+.{_digits(one)}f}",
            _interval(one),
            _p(one.p),
            "–" if math.isnan(one.visible) else WORDS[one.measure].form(one.visible),
            f"{one.seeds}",
            f"{one.samples}" if one.samples else "–",
        ]
        for one in found
        if not one.why_not
    ]
    header = [
        "comparison",
        "task",
        "measure",
        "difference",
        "95 % interval",
        "Holm's p",
        "could see",
        "seeds",
        "samples",
    ]
    note = "Paired differences on held-out samples, in nats a token or points; the reference comes second."
    if any(one.measure == FORGOTTEN for one in found):
        note = (
            "How much more the loss on the second domain rose, at the largest gain on the task that both settings "
            "reach with every seed; Student's interval over seeds."
        )
    return Table(header, rows, note)


def _settings_table(study: Study, made: Plan, results: Results, question: Question) -> Table:
    rows = []
    for task, setting in itertools.product(question.tasks, question.settings):
        runs = list(runs_of(study, made, results, task, setting).values())
        if not runs:
            continue
        mean = {
            key: sum(run.measures[key] for run in runs) / len(runs)
            for key in ("loss_before", "loss_after", "exact_match_after", "valid_after", "trainable_params")
            if all(key in run.measures for run in runs)
        }
        shares = [f"{100 * mean[key]:.1f} %" if key in mean else "–" for key in ("exact_match_after", "valid_after")]
        losses = [f"{mean[key]:.4f}" for key in ("loss_before", "loss_after")]
        parameters = f"{mean['trainable_params']:,.0f}"
        rows.append([setting, task, f"{made.choices[task, setting]:g}", f"{len(runs)}", *losses, *shares, parameters])
    header = [
        "setting",
        "task",
        "learning rate",
        "seeds",
        "loss before",
        "after",
        "right answers",
        "valid",
        "parameters",
    ]
    return Table(header, rows, "Each setting at its best learning rate: means over seeds.")
