"""The report's pictures of loss: by setting, rank, block size, cost and step; `pictures` makes these and the others."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy
from matplotlib import ticker

from experiments.report.drawing import (
    LOSS,
    Picture,
    errorbar,
    finish,
    log_ticks,
    looks,
    new_figure,
    scatter,
    series_of,
    style,
)
from experiments.report.measure_plots import exact_match, expert_load, forgetting, rank_in_use, target_modules
from experiments.report.statistics import mean
from experiments.runs.groups import Group
from experiments.system.palette import COLOURS

LINES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))  # of levels, so that colour alone need not tell

MAX_CURVES = 10  # in one panel


def pictures(group: Group) -> list[Picture]:
    """The pictures that the group's runs have data for."""
    makers: tuple[Callable[[Group], Picture | None], ...] = (
        *(
            settings,
            learning_rate,
            rank,
            block_size,
            target_modules,
            cost,
            exact_match,
            forgetting,
            rank_in_use,
            expert_load,
            curves,
        ),
    )
    return [picture for maker in makers if (picture := maker(group)) is not None]


def settings(group: Group) -> Picture | None:
    """Every setting in a row, best first, each seed a point."""
    by_setting = group.settings()
    if len(by_setting) < 2:
        return None
    labels = sorted(by_setting, key=lambda label: mean(by_setting[label], "loss_after").mean, reverse=True)
    height = 1.6 + 0.3 * len(labels)
    figure, (after, both) = new_figure(group, "Held-out loss of every setting", group.runs, 2, height)
    for row, label in enumerate(labels):
        runs = by_setting[label]
        losses = [run.measures["loss_after"] for run in runs]
        end, start = mean(runs, "loss_after"), mean(runs, "loss_before")
        after.plot(losses, [row] * len(losses), "o", mfc="none", mec="0.45", ms=5, label="a seed" if not row else None)
        deviation = None if math.isnan(end.std) else end.std
        after.errorbar(
            end.mean, row, xerr=deviation, fmt="D", color=COLOURS[0], capsize=3, label="mean ± std" if not row else None
        )
        both.plot([start.mean, end.mean], [row, row], color="0.6", lw=1.2)
        both.plot(start.mean, row, "o", mfc="white", mec=COLOURS[1], ms=6, label="before training" if not row else None)
        both.plot(end.mean, row, "D", color=COLOURS[0], ms=6, label="after" if not row else None)
    for axes in (after, both):
        axes.set_ylim(-0.6, len(labels) - 0.4)
        axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    after.set_yticks(range(len(labels)), labels)
    both.set_yticks(range(len(labels)), [""] * len(labels))
    finish(after, xlabel=f"{LOSS}, after")
    finish(both, xlabel=LOSS)
    caption = (
        "Held-out loss of every setting, best on top. Left: after training, each seed and the mean ± standard "
        "deviation over seeds. Right: the mean before and after."
    )
    return Picture("settings", caption, figure, group.runs)


def rank(group: Group) -> Picture | None:
    """Loss against rank, a line a method; a method without rank is a level."""
    if "rank" not in group.varied:
        return None
    ranked = [run for run in group.runs if "rank" in run.config]
    unranked = {label: runs for label, runs in group.settings().items() if "rank" not in runs[0].config}
    series = series_of(group, "rank", ranked)
    if max(map(len, series.values())) < 2:  # a search: no two runs differ in rank alone
        return None
    figure, (axes,) = new_figure(group, "Held-out loss by rank", group.runs)
    levels = looks(group, unranked)
    free = [one for one in map(style, range(len(series) + len(levels))) if one not in levels.values()]
    lines = dict(zip(sorted(series), free))
    for number, (label, points) in enumerate(series.items()):
        beside = 2 ** (0.06 * (number - (len(series) - 1) / 2))  # so that the bars of two series do not hide each other
        means = [mean(runs, "loss_after") for runs in points.values()]
        errorbar(axes, [x * beside for x in points], means, label=label, lw=1.4, **lines[label])
    for number, (label, runs) in enumerate(unranked.items()):
        line = LINES[number % len(LINES)]
        level, colour = mean(runs, "loss_after"), levels[label]["color"]
        axes.axhline(level.mean, color=colour, ls=line, lw=1.4, label=f"{label} (has no rank)")
        if level.n > 1:
            axes.axhspan(level.mean - level.std, level.mean + level.std, color=colour, alpha=0.15, lw=0)
    log_ticks(axes, {run.config["rank"] for run in ranked})
    finish(axes, xlabel="rank", ylabel=LOSS)
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=4
    )
    return Picture(
        "rank", "Held-out loss after training against rank: mean ± standard deviation over seeds.", figure, group.runs
    )


def learning_rate(group: Group) -> Picture | None:
    """Loss against the learning rate, a point a run: in a search all else may differ too."""
    if "lr" not in group.varied:
        return None
    figure, (axes,) = new_figure(group, "Held-out loss by learning rate", group.runs)
    for position, method in enumerate(sorted({run.method for run in group.runs})):
        runs = [run for run in group.runs if run.method == method]
        losses = [run.measures["loss_after"] for run in runs]
        axes.plot([run.config["lr"] for run in runs], losses, ls="none", label=method, **style(position))
    axes.set_xscale("log")
    finish(axes, xlabel="learning rate", ylabel=f"{LOSS}, after")
    axes.legend(frameon=False, fontsize="small")
    caption = "Held-out loss after training against the learning rate, a point a run, whatever else differs."
    return Picture("learning_rate", caption, figure, group.runs)


def block_size(group: Group) -> Picture | None:
    """Loss after and before training, and bits a weight, against the block size."""
    key = "quant.blocksize"
    if key not in group.varied:
        return None
    runs = [run for run in group.runs if key in run.config]
    series = series_of(group, key, runs)
    if max(map(len, series.values())) < 2:
        return None
    figure, panels = new_figure(group, "Block size of the packed base", runs, 3, 4.6, 14)
    measures = {"loss_after": f"{LOSS}, after", "loss_before": f"{LOSS}, before", "bits_per_weight": "bits a weight"}
    for axes, (measure, label) in zip(panels, measures.items()):
        for position, (name, points) in enumerate(series.items()):
            errorbar(
                axes, list(points), [mean(r, measure) for r in points.values()], label=name, lw=1.6, **style(position)
            )
        log_ticks(axes, {run.config[key] for run in runs})
        finish(axes, xlabel="block size (weights that share an absmax)", ylabel=label)
        axes.tick_params(axis="x", labelsize="small")
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=3
    )
    caption = (
        "Held-out loss after and before training, and bits a weight of the decoder's linears with their constants, "
        "against the block size: mean ± standard deviation over seeds."
    )
    return Picture("block_size", caption, figure, runs)


def cost(group: Group) -> Picture | None:
    """Loss against training time and against peak memory, with the Pareto front."""
    by_setting = group.settings()
    if len(by_setting) < 2:
        return None
    figure, panels = new_figure(group, "Held-out loss by cost", group.runs, 2, 5.2, 13)
    scales = {"train_seconds": (1, "training time (s)"), "peak_memory_bytes": (1e9, "peak memory (GB)")}
    for axes, (measure, (scale, label)) in zip(panels, scales.items()):
        scatter(axes, group, by_setting, measure, scale, label)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=7
    )
    caption = (
        "Held-out loss after training against training time and against the peak memory of the run's process: means "
        "± standard deviation over seeds. Ringed and named: the Pareto front, where nothing else is both cheaper and "
        "better by more than 1 %."
    )
    return Picture("cost", caption, figure, group.runs)


def curves(group: Group) -> Picture | None:
    """Training and held-out loss by step, mean and band over seeds."""
    shown_runs = [run for run in group.runs if run.curve]
    if not shown_runs:
        return None
    by_setting = {label: [r for r in runs if r.curve] for label, runs in group.settings().items()}
    by_setting = {label: runs for label, runs in by_setting.items() if runs}
    settings_of = Counter(runs[0].method for runs in by_setting.values())
    panels = defaultdict(dict)
    for label, runs in by_setting.items():
        alone = len(by_setting) <= MAX_CURVES or settings_of[runs[0].method] == 1
        panels["" if alone else runs[0].method][label] = runs
    height = 4.4 if len(panels) == 1 else 3.2 * len(panels)
    figure, _ = new_figure(group, "Training curves", shown_runs, 1, height, 12)
    figure.axes[0].remove()
    grid = figure.subplots(len(panels), 2, squeeze=False, sharex=True, sharey="col")
    for (left, right), members in zip(grid, panels.values()):
        styles = looks(group, members)
        for position, (label, runs) in enumerate(members.items()):
            for axes, key, marks in ((left, "loss", False), (right, "heldout_loss", True)):
                steps, middle, deviation = band([run.curve for run in runs], key)
                look = styles[label] if marks else {"color": styles[label]["color"]}
                line = "-" if position < len(COLOURS) else "--"
                axes.plot(steps, middle, lw=1.4, ls=line, label=label, **look)
                axes.fill_between(steps, middle - deviation, middle + deviation, color=look["color"], alpha=0.15, lw=0)
        finish(left, xlabel="optimizer step", ylabel="loss of the training batch (nats a token)")
        finish(right, xlabel="optimizer step", ylabel=LOSS)
        left.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        right.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    caption = (
        "Loss by optimizer step: mean over seeds, band ± standard deviation. Left: training batches. Right: held out."
    )
    return Picture("curves", caption, figure, shown_runs)


def band(curves: list[list[dict]], key: str) -> tuple[list[float], numpy.ndarray, numpy.ndarray]:
    """Steps that every curve has, and there the mean and standard deviation of `key` (0 for one curve)."""
    values = [{record["step"]: record[key] for record in curve if key in record} for curve in curves]
    steps = sorted(set.intersection(*(set(points) for points in values)))
    table = numpy.array([[points[step] for step in steps] for points in values], dtype=float)
    return steps, table.mean(axis=0), table.std(axis=0, ddof=1) if len(curves) > 1 else numpy.zeros(len(steps))
