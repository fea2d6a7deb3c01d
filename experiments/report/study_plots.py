"""The pictures of a study: differences with their intervals, loss by learning rate, forgetting against gain."""

import math
from collections import defaultdict

import numpy
from matplotlib import ticker
from matplotlib.figure import Figure

from experiments.report.drawing import LOSS, Picture, errorbar, finish, log_ticks, style
from experiments.report.statistics import mean
from experiments.runs.groups import Run
from experiments.studies.answers import FORGOTTEN, Answer
from experiments.system.palette import COLOURS

LABELS = {
    "loss": (1, "difference of the held-out loss (nats a token)"),
    "exact_match": (100, "difference of right answers (points)"),
    "valid": (100, "difference of valid answers (points)"),
    FORGOTTEN: (1, "difference of what is forgotten at equal gain (nats a token)"),
}


def differences(title: str, found: list[Answer], runs: list[Run]) -> Picture:
    """Each comparison a row, a panel a measure: the difference, its interval, and what could have been seen."""
    known = [one for one in found if not one.why_not]
    measures = list(dict.fromkeys(one.measure for one in known))
    rows = list(dict.fromkeys((one.a, one.b, one.task) for one in known))
    figure = Figure(figsize=(5.4 * len(measures) + 2, 1.8 + 0.32 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for axes, measure in zip(panels, measures):
        scale, label = LABELS[measure]
        shown = set()
        for one in (one for one in known if one.measure == measure):
            y = len(rows) - 1 - rows.index((one.a, one.b, one.task))
            kind = "told apart (Holm's p < 0.05)" if one.told_apart else "not told apart"
            colour = COLOURS[0] if one.told_apart else "0.5"
            bars = [[scale * (one.mean - one.low)], [scale * (one.high - one.mean)]]
            look = {"fmt": "o" if one.told_apart else "s", "color": colour, "capsize": 3, "ms": 5}
            axes.errorbar(scale * one.mean, y, xerr=bars, label=None if kind in shown else kind, **look)
            if not math.isnan(one.visible):
                for end in (-one.visible, one.visible):
                    name = None if "seen" in shown else "smallest difference that could be seen"
                    axes.plot(scale * end, y, "|", color=COLOURS[1], ms=9, label=name, ls="none")
                    shown.add("seen")
            shown.add(kind)
        axes.axvline(0, color="0.3", lw=1)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        finish(axes, xlabel=label)
    panels[0].set_yticks(range(len(rows)), [f"{b} − {a}, {task}" for a, b, task in rows[::-1]], fontsize="small")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())
    }  # of all panels, each once
    figure.legend(handles.values(), handles, frameon=False, fontsize="small", loc="outside lower center", ncols=3)
    caption = (
        "Paired differences with 95 % intervals, the reference comes second. Blue: told apart after Holm's "
        "correction. Marks on both sides of 0: the smallest difference that the comparison sees with a power of 80 %."
    )
    return Picture("differences", caption, figure, runs)


def curves_of_rates(
    title: str, rounds: dict, choices: dict[tuple[str, str], float], untrained: dict[str, float], runs: list[Run]
) -> Picture:
    """Validation loss by learning rate, a panel a task, a line a setting and round of the search.

    Args:
        untrained: of each task the loss before training. Points above are drawn at that height, or a run that diverged
            would leave no room for all others.
    """
    figure = Figure(figsize=(4.6 * len(rounds) + 1.5, 4.6), layout="constrained")
    figure.suptitle(f"{title} Learning rates tried", fontsize="medium")
    panels = figure.subplots(1, len(rounds), squeeze=False)[0]
    for axes, (task, of_setting) in zip(panels, rounds.items()):
        for position, (setting, found) in enumerate(of_setting.items()):
            look = style(position)
            for number, losses in enumerate(found.values(), start=1):
                last = number == len(found)
                faint = {"alpha": 0.25 + 0.75 * number / len(found), "lw": 1.4 if last else 0.8}
                line = {"ls": "-" if last else ":", "label": setting if last else None}
                highest = untrained[task]
                axes.plot(list(losses), [min(loss, highest) for loss in losses.values()], **look, **faint, **line)
                above = [lr for lr, loss in losses.items() if loss > highest]
                axes.plot(above, [highest] * len(above), "^", color=look["color"], ms=10, mfc="none")
            best = choices.get((task, setting))
            if best is not None:
                last = list(found.values())[-1]
                axes.plot(best, last[best], "o", mfc="none", mec=look["color"], ms=13)
        axes.set_xscale("log")
        axes.set_yscale("log")
        shown = numpy.geomspace(*axes.get_ylim(), 8)[1:-1]
        axes.set_yticks(shown, [f"{loss:.2g}" for loss in shown])
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        finish(axes, xlabel="learning rate", ylabel="validation loss (nats a token)", title=task)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, frameon=False, fontsize="small", loc="outside lower center", ncols=6)
    caption = (
        "Loss on validation samples by learning rate. Dotted: the search's earlier rounds, of fewer steps; solid: the "
        "last one. Ringed: the choice. A large triangle stands for a loss above that of the untrained model."
    )
    return Picture("learning_rates", caption, figure, runs)


def forgetting(title: str, paths: dict, gains: dict[str, float], runs: list[Run]) -> Picture:
    """What is forgotten against what is gained, along rising learning rates: a panel a task, a line a setting."""
    figure = Figure(figsize=(4.8 * len(paths) + 1.5, 4.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(1, len(paths), squeeze=False)[0]
    for axes, (task, of_setting) in zip(panels, paths.items()):
        for position, (setting, of_seed) in enumerate(of_setting.items()):
            look = style(position)
            for points in of_seed.values():
                axes.plot(*zip((0, 0), *points), color=look["color"], lw=0.6, alpha=0.35)
            if of_seed:
                middle = numpy.mean([[(0, 0), *points] for points in of_seed.values()], axis=0)
                axes.plot(*middle.T, label=setting, lw=1.6, **look)
        if gains[task]:
            axes.axvline(gains[task], color="0.5", ls=":", label="largest gain that all reach")
        axes.axhline(0, color="0.6", lw=1, zorder=0)
        finish(axes, xlabel="gain on the task (nats a token)", ylabel="rise of the second domain's loss", title=task)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, frameon=False, fontsize="small", loc="outside lower center", ncols=5)
    caption = (
        "Rise of the loss on a second domain, which no step trains on, against the fall of the held-out loss on the "
        "task, from no training along rising learning rates: means over seeds, and each seed faintly. Lower is better."
    )
    return Picture("forgetting", caption, figure, runs)


def by_rank(title: str, runs: dict[str, list[list[Run]]]) -> Picture | None:
    """Held-out loss by rank, a panel a task, a line for each rule of the scale; None for fewer than three ranks.

    Args:
        runs: of each task the runs of each setting.
    """
    lines: dict[str, dict] = {task: defaultdict(dict) for task in runs}
    for task, settings in runs.items():
        for members in settings:
            if members and "rank" in members[0].config:
                config = members[0].config
                lines[task][config["method.name"], config.get("rslora", False)][config["rank"]] = members
    if max(len(points) for of_task in lines.values() for points in of_task.values() or [[]]) < 3:
        return None
    every = [run for of_task in lines.values() for points in of_task.values() for m in points.values() for run in m]
    figure = Figure(figsize=(4.8 * len(runs) + 1.5, 4.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (task, of_task) in zip(panels, lines.items()):
        for position, ((method, root), points) in enumerate(sorted(of_task.items())):
            ranks = sorted(points)
            errorbar(
                axes,
                ranks,
                [mean(points[r], "loss_after") for r in ranks],
                label=f"{method}, {'α/√r' if root else 'α/r'}",
                **style(position),
            )
        log_ticks(axes, {run.config["rank"] for run in every})
        finish(axes, xlabel="rank", ylabel=LOSS, title=task)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, frameon=False, fontsize="small", loc="outside lower center", ncols=5)
    caption = "Held-out loss after training against rank, each at its best learning rate: mean ± deviation over seeds."
    return Picture("rank", caption, figure, every)
