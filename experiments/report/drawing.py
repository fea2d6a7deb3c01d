"""Shared parts of the report's pictures: a figure with its title, error bars, the order of settings."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib import ticker
from matplotlib.figure import Figure

from experiments.report.statistics import Mean, front, mean
from experiments.runs.groups import Group, Run
from experiments.system.palette import COLOURS, MARKERS

LOSS = "held-out loss (nats a token)"
MAX_LABELS = 8  # curves that one panel can hold


@dataclass
class Picture:
    """A figure, its caption, and the runs behind it."""

    name: str
    caption: str
    figure: Figure
    runs: list[Run]


def style(position: int) -> dict:
    return {"color": COLOURS[position % len(COLOURS)], "marker": MARKERS[position % len(MARKERS)], "ms": 6}


def looks(group: Group, labels: Iterable[str]) -> dict[str, dict]:
    """The look of each setting: the same in every picture of the group, if all its settings can have their own."""
    settings = list(group.settings())
    if len(settings) > len(COLOURS):
        settings = [label for label in settings if label in set(labels)]
    return {label: style(settings.index(label)) for label in labels}


def new_figure(group: Group, title: str, runs: list[Run], columns: int = 1, height: float = 4.4, width: float = 0):
    figure = Figure(figsize=(width or (7.4 if columns == 1 else 5.6 * columns), height), layout="constrained")
    seeds = sorted({run.seed for run in runs})
    who = f"{len(runs)} runs, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    figure.suptitle(f"{title}\n{group.title}; {who}", fontsize="medium")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def finish(axes, **labels) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.3)


def errorbar(axes, x: list, means: list[Mean], **kwargs) -> None:
    deviations = [0.0 if math.isnan(m.std) else m.std for m in means]
    axes.errorbar(x, [m.mean for m in means], yerr=deviations if any(deviations) else None, capsize=3, **kwargs)


def series_of(group: Group, key: str, runs: list[Run]) -> dict[str, dict[float, list[Run]]]:
    """By setting without `key`: the runs at each of its values, in order."""
    series = defaultdict(lambda: defaultdict(list))
    for run in runs:
        series[group.label(run, without=(key,))][run.config[key]].append(run)
    return {label: dict(sorted(points.items())) for label, points in series.items()}


def log_ticks(axes, values: set[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def scatter(axes, group: Group, settings: dict[str, list[Run]], measure: str, scale: float, label: str) -> None:
    """Loss after training against a cost, a point a setting, with the Pareto front.

    A point has the look of its setting if each can have one, else of its method, and then the rest of its name.
    """
    few = len(group.settings()) <= len(COLOURS)
    methods = sorted({run.method for run in group.runs})
    styles = looks(group, settings) if few else {name: style(methods.index(name)) for name in methods}
    points = {}
    for name, runs in settings.items():
        x, y = mean(runs, measure), mean(runs, "loss_after")
        points[name] = (x.mean / scale, y.mean)
        bars = {"xerr": x.std / scale, "yerr": y.std} if x.n > 1 else {}
        shown = name if few else runs[0].method
        seen = shown in axes.get_legend_handles_labels()[1]
        axes.errorbar(*points[name], **bars, ls="none", elinewidth=0.8, label=None if seen else shown, **styles[shown])
    best = front(points)
    axes.step(*zip(*(points[name] for name in best)), where="post", color="0.4", ls=":", lw=1.4, zorder=0)
    axes.plot(
        *zip(*(points[name] for name in best)), "o", mfc="none", mec="0.2", ms=13, label="Pareto front", ls="none"
    )
    for number, name in enumerate(best):  # neighbours on different sides, that their names do not meet
        at = (8, 8) if number % 2 == 0 else (8, -14)
        axes.annotate(name, points[name], xytext=at, textcoords="offset points", fontsize="x-small")
    if not few:
        for name in points.keys() - set(best):
            rest = name.removeprefix(settings[name][0].method).strip()
            at = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": "xx-small", "color": "0.45"}
            axes.annotate(rest, points[name], **at)
    axes.margins(x=0.18, y=0.12)
    finish(axes, xlabel=label, ylabel=LOSS)
