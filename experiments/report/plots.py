"""The report's pictures, and of each the runs behind it."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy
from matplotlib import ticker
from matplotlib.figure import Figure

from experiments.report.runs import Group, Run
from experiments.report.statistics import Mean, front, mean

# Okabe and Ito's palette and markers: distinct to colour-blind readers and, by the markers, in grey. Eight colours and
# seven markers give 56 different pairs.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LOSS = "held-out loss (nats a token)"
MAX_LABELS = 8  # curves that one panel can hold


@dataclass
class Picture:
    """A figure, what it shows, and the runs behind it."""

    name: str
    caption: str
    figure: Figure
    runs: list[Run]


def style(position: int) -> dict:
    return {"color": COLOURS[position % len(COLOURS)], "marker": MARKERS[position % len(MARKERS)], "ms": 6}


def pictures(group: Group) -> list[Picture]:
    """Those that the group's runs have something to say in."""
    makers: tuple[Callable[[Group], Picture | None], ...] = (settings, rank, block_size, cost, curves)
    return [picture for maker in makers if (picture := maker(group)) is not None]


def _figure(group: Group, title: str, runs: list[Run], columns: int = 1, height: float = 4.4, width: float = 0):
    figure = Figure(figsize=(width or (7.4 if columns == 1 else 5.6 * columns), height), layout="constrained")
    seeds = sorted({run.seed for run in runs})
    who = f"{len(runs)} runs, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    figure.suptitle(f"{title}\n{group.title}; {who}", fontsize="medium")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _finish(axes, **labels) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.3)


def _errorbar(axes, x: list, means: list[Mean], **kwargs) -> None:
    deviations = [0.0 if math.isnan(m.std) else m.std for m in means]
    axes.errorbar(x, [m.mean for m in means], yerr=deviations if any(deviations) else None, capsize=3, **kwargs)


def settings(group: Group) -> Picture | None:
    """Every setting in a row, best first, each seed a point."""
    by_setting = group.settings()
    if len(by_setting) < 2:
        return None
    labels = sorted(by_setting, key=lambda label: mean(by_setting[label], "loss_after").mean, reverse=True)
    height = 1.6 + 0.3 * len(labels)
    figure, (after, both) = _figure(group, "Held-out loss of every setting", group.runs, 2, height)
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
    _finish(after, xlabel=f"{LOSS}, after")
    _finish(both, xlabel=LOSS)
    caption = (
        "Held-out loss of every setting, best on top. Left: after training, each seed and the mean ± standard "
        "deviation over seeds. Right: the mean before and after."
    )
    return Picture("settings", caption, figure, group.runs)


def _series(group: Group, key: str, runs: list[Run]) -> dict[str, dict[float, list[Run]]]:
    """By setting without `key`: the runs at each of its values, in order."""
    series = defaultdict(lambda: defaultdict(list))
    for run in runs:
        series[group.label(run, without=(key,))][run.config[key]].append(run)
    return {label: dict(sorted(points.items())) for label, points in series.items()}


def _log_ticks(axes, values: set[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def rank(group: Group) -> Picture | None:
    """Loss against rank, a line a method; a method without rank is a level."""
    if "rank" not in group.varied:
        return None
    ranked = [run for run in group.runs if "rank" in run.config]
    unranked = {label: runs for label, runs in group.settings().items() if "rank" not in runs[0].config}
    figure, (axes,) = _figure(group, "Held-out loss by rank", group.runs)
    series = _series(group, "rank", ranked)
    positions = {label: position for position, label in enumerate(sorted([*series, *unranked]))}
    for number, (label, points) in enumerate(series.items()):
        beside = 2 ** (0.06 * (number - (len(series) - 1) / 2))  # so that the bars of two series do not hide each other
        means = [mean(runs, "loss_after") for runs in points.values()]
        _errorbar(axes, [x * beside for x in points], means, label=label, lw=1.4, **style(positions[label]))
    for label, runs in unranked.items():
        level, colour = mean(runs, "loss_after"), style(positions[label])["color"]
        axes.axhline(level.mean, color=colour, ls="--", lw=1.4, label=f"{label} (has no rank)")
        if level.n > 1:
            axes.axhspan(level.mean - level.std, level.mean + level.std, color=colour, alpha=0.15, lw=0)
    _log_ticks(axes, {run.config["rank"] for run in ranked})
    _finish(axes, xlabel="rank", ylabel=LOSS)
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=4
    )
    return Picture(
        "rank", "Held-out loss after training against rank: mean ± standard deviation over seeds.", figure, group.runs
    )


def block_size(group: Group) -> Picture | None:
    """Loss after and before training, and bits a weight, against the block size."""
    key = "quant.blocksize"
    if key not in group.varied:
        return None
    runs = [run for run in group.runs if key in run.config]
    figure, panels = _figure(group, "Block size of the packed base", runs, 3, 4.6, 14)
    measures = {"loss_after": f"{LOSS}, after", "loss_before": f"{LOSS}, before", "bits_per_weight": "bits a weight"}
    for axes, (measure, label) in zip(panels, measures.items()):
        for position, (name, points) in enumerate(_series(group, key, runs).items()):
            _errorbar(
                axes, list(points), [mean(r, measure) for r in points.values()], label=name, lw=1.6, **style(position)
            )
        _log_ticks(axes, {run.config[key] for run in runs})
        _finish(axes, xlabel="block size (weights that share an absmax)", ylabel=label)
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
    figure, panels = _figure(group, "Held-out loss by cost", group.runs, 2, 5.2, 13)
    methods = sorted({run.method for run in group.runs})
    scales = {"train_seconds": (1, "training time (s)"), "peak_memory_bytes": (1e9, "peak memory (GB)")}
    for axes, (measure, (scale, label)) in zip(panels, scales.items()):
        points = {}
        for name, runs in by_setting.items():
            x, y = mean(runs, measure), mean(runs, "loss_after")
            points[name] = (x.mean / scale, y.mean)
            bars = {"xerr": x.std / scale, "yerr": y.std} if x.n > 1 else {}
            seen = runs[0].method in axes.get_legend_handles_labels()[1]
            axes.errorbar(
                *points[name],
                **bars,
                ls="none",
                elinewidth=0.8,
                label=None if seen else runs[0].method,
                **style(methods.index(runs[0].method)),
            )
        best = front(points)
        axes.step(*zip(*(points[name] for name in best)), where="post", color="0.4", ls=":", lw=1.4, zorder=0)
        axes.plot(
            *zip(*(points[name] for name in best)), "o", mfc="none", mec="0.2", ms=13, label="Pareto front", ls="none"
        )
        for name in best:
            axes.annotate(name, points[name], xytext=(8, 8), textcoords="offset points", fontsize="x-small")
        axes.margins(x=0.18, y=0.12)
        _finish(axes, xlabel=label, ylabel=LOSS)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=7
    )
    caption = (
        "Held-out loss after training against training time and against the peak memory of the run's process: means "
        "± standard deviation over seeds. Ringed and named: the Pareto front, where nothing else is both cheaper and "
        "better."
    )
    return Picture("cost", caption, figure, group.runs)


def curves(group: Group) -> Picture | None:
    """Training and held-out loss by step, mean and band over seeds."""
    shown_runs = [run for run in group.runs if run.curve]
    if not shown_runs:
        return None
    by_setting = {label: [r for r in runs if r.curve] for label, runs in group.settings().items()}
    by_setting = {label: runs for label, runs in by_setting.items() if runs}
    panels = defaultdict(dict)
    for label, runs in by_setting.items():
        panels[runs[0].method if len(by_setting) > MAX_LABELS else ""][label] = runs
    height = 4.4 if len(panels) == 1 else 3.2 * len(panels)
    figure, _ = _figure(group, "Training curves", shown_runs, 1, height, 12)
    figure.axes[0].remove()
    grid = figure.subplots(len(panels), 2, squeeze=False, sharex=True, sharey="col")
    for (left, right), members in zip(grid, panels.values()):
        for position, (label, runs) in enumerate(members.items()):
            for axes, key, marks in ((left, "loss", False), (right, "heldout_loss", True)):
                steps, middle, deviation = band([run.curve for run in runs], key)
                look = style(position) if marks else {"color": style(position)["color"]}
                axes.plot(steps, middle, lw=1.4, label=label, **look)
                axes.fill_between(steps, middle - deviation, middle + deviation, color=look["color"], alpha=0.15, lw=0)
        _finish(left, xlabel="optimizer step", ylabel="loss of the training batch (nats a token)")
        _finish(right, xlabel="optimizer step", ylabel=LOSS)
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
