"""The report's pictures of measures beside the loss: right answers, forgetting, the rank in use, layers."""

import math
import re
from collections import defaultdict

import numpy
from matplotlib import ticker

from experiments.report.drawing import (
    LOSS,
    MAX_LABELS,
    Picture,
    errorbar,
    finish,
    looks,
    new_figure,
    scatter,
    style,
)
from experiments.report.statistics import mean
from experiments.runs.groups import Group, Run, shown

LEVEL = r"exact_match_level_(\d+)_after"


def _best_first(group: Group, runs: list[Run]) -> dict[str, list[Run]]:
    """The settings of those of the group's runs, lowest loss first."""
    wanted = set(map(id, runs))
    settings = {label: [run for run in members if id(run) in wanted] for label, members in group.settings().items()}
    settings = {label: members for label, members in settings.items() if members}
    return dict(sorted(settings.items(), key=lambda item: mean(item[1], "loss_after").mean))


def exact_match(group: Group) -> Picture | None:
    """Right answers by difficulty before and after, of the best settings."""
    runs = [run for run in group.runs if "exact_match_after" in run.measures]
    if not runs:
        return None
    levels = sorted(
        {int(found[1]) for run in runs for name in run.measures if (found := re.fullmatch(LEVEL, name)) is not None}
    )
    measures = ["exact_match", *(f"exact_match_level_{level}" for level in levels)]
    figure, (axes,) = new_figure(group, "Exact match of generated answers", runs, height=4.8, width=9.5)
    settings = dict(list(_best_first(group, runs).items())[:MAX_LABELS])
    styles = looks(group, settings)
    for position, (label, members) in enumerate(settings.items()):
        beside = 0.06 * (position - (len(settings) - 1) / 2)
        values = [mean(members, f"{measure}_after").scaled(100) for measure in measures]
        places = [place + beside for place in range(len(measures))]
        errorbar(axes, places, values, label=label, ls="none", **styles[label])
    before = [mean(runs, f"{measure}_before").mean * 100 for measure in measures]
    axes.hlines(before, *zip(*((place - 0.4, place + 0.4) for place in range(len(measures)))), color="0.4", ls=":")
    axes.plot([], [], color="0.4", ls=":", label="before training, all runs")
    axes.set_xticks(range(len(measures)), ["all", *(f"level {level}" for level in levels)])
    axes.set_ylim(-2, max(10, axes.get_ylim()[1]))
    finish(axes, xlabel="difficulty of the problem", ylabel="right answers (%)")
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    which = f" The {MAX_LABELS} settings with the lowest loss." if len(settings) < len(group.settings()) else ""
    caption = (
        "Share of held-out prompts that are answered with exactly the reference, all and by level of difficulty: mean "
        f"± standard deviation over seeds.{which}"
    )
    return Picture("exact_match", caption, figure, runs)


def forgetting(group: Group) -> Picture | None:
    """Learning against the forgetting of a second domain."""
    runs = [run for run in group.runs if "second_loss_rise" in run.measures]
    settings = _best_first(group, runs)
    if len(settings) < 2:
        return None
    domains = sorted({str(run.config.get("second.name")) for run in runs})
    figure, (axes,) = new_figure(group, "Learning and forgetting", runs, height=5.2, width=8)
    label = f"rise of the loss on {', '.join(domains)} (nats a token)"
    scatter(axes, group, settings, "second_loss_rise", 1, label)
    axes.axvline(0, color="0.6", lw=1, zorder=0)
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=6
    )
    caption = (
        f"Held-out loss after training against the rise of the loss on a second domain ({', '.join(domains)}), which "
        "no step trains on: means ± standard deviation over seeds. Left of the line that loss fell. Ringed and named: "
        "the Pareto front, where nothing else forgets less and has a lower loss."
    )
    return Picture("forgetting", caption, figure, runs)


def target_modules(group: Group) -> Picture | None:
    """Loss before and after by the linears that have adapters, and the number of parameters."""
    key = "target_modules"
    if key not in group.varied:
        return None
    runs = [run for run in group.runs if key in run.config]
    series: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        series[group.label(run, without=(key,))][shown(run.config[key])].append(run)
    choices: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        choices[shown(run.config[key])].append(run)
    rows = sorted(choices, key=lambda row: mean(choices[row], "loss_after").mean, reverse=True)
    figure, (both, cost) = new_figure(group, "Which linears have an adapter", runs, 2, 1.8 + 0.35 * len(rows), 13)
    for position, (label, points) in enumerate(series.items()):
        look = style(position)
        for number, (row, members) in enumerate(points.items()):
            y = rows.index(row) + 0.12 * (position - (len(series) - 1) / 2)
            start, end = mean(members, "loss_before"), mean(members, "loss_after")
            bar = None if math.isnan(end.std) else end.std
            both.plot([start.mean, end.mean], [y, y], color="0.7", lw=1.2, zorder=0)
            first = number + position == 0
            both.plot(start.mean, y, "o", mfc="white", mec="0.3", ms=6, label="before training" if first else None)
            both.errorbar(
                end.mean, y, xerr=bar, capsize=3, label=None if number else f"{label}, after", ls="none", **look
            )
            trained = mean(members, "trainable_params").mean
            cost.errorbar(trained, end.mean, yerr=bar, capsize=3, ls="none", **look)
            if position == 0:
                at = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": "x-small"}
                cost.annotate(row.strip("[]"), (trained, end.mean), **at)
    both.set_yticks(range(len(rows)), [row.strip("[]") for row in rows], fontsize="small")
    cost.set_xscale("log")
    cost.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    cost.xaxis.set_major_formatter(ticker.EngFormatter())
    cost.xaxis.set_minor_locator(ticker.NullLocator())
    cost.margins(x=0.35, y=0.12)
    finish(both, xlabel=LOSS)
    finish(cost, xlabel="trained parameters", ylabel=f"{LOSS}, after")
    figure.legend(
        *both.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=4
    )
    caption = (
        "Held-out loss by which linears have an adapter: before and after training, and after training against the "
        "number of trained parameters. Mean ± standard deviation over seeds."
    )
    return Picture("target_modules", caption, figure, runs)


def rank_in_use(group: Group) -> Picture | None:
    """The effective rank of the updates by type of linear and by depth."""
    runs = [run for run in group.runs if any(run.effective_ranks.values())]
    if not runs:
        return None
    ranked = list(_best_first(group, runs))
    settings = {label: members for label, members in group.settings().items() if label in ranked[:MAX_LABELS]}
    styles = looks(group, settings)
    kinds = list(dict.fromkeys(_kind(name) for run in runs for name in run.effective_ranks))
    figure, (by_kind, by_depth) = new_figure(group, "The rank that an update uses", runs, 2, 4.8, 13)
    for position, (label, members) in enumerate(settings.items()):
        for axes, of in ((by_kind, lambda name: kinds.index(_kind(name))), (by_depth, _depth)):
            values = defaultdict(list)
            for run in members:
                for name, value in run.effective_ranks.items():
                    values[of(name)].append(value)
            places = sorted(place for place in values if place is not None)
            beside = 0.06 * (position - (len(settings) - 1) / 2)
            middle = [float(numpy.mean(values[place])) for place in places]
            deviation = [float(numpy.std(values[place])) for place in places]
            axes.errorbar(
                [place + beside for place in places],
                middle,
                yerr=deviation,
                lw=1.2,
                elinewidth=0.6,
                label=label,
                **styles[label],
            )
    ranks = [mean(members, "effective_rank").mean for members in settings.values()]
    for axes in (by_kind, by_depth):
        if max(ranks) > 4 * min(ranks):
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        else:
            axes.set_ylim(bottom=0)
    by_kind.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    by_depth.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    finish(by_kind, xlabel="linear", ylabel="effective rank of ΔW")
    finish(by_depth, xlabel="block of the decoder", ylabel="effective rank of ΔW")
    figure.legend(
        *by_kind.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=4
    )
    which = f"; the {MAX_LABELS} settings with the lowest loss" if len(settings) < len(ranked) else ""
    caption = (
        "Effective rank, the exponential of the entropy of ΔW's singular values (Roy and Vetterli 2007), by kind of "
        f"linear and by depth{which}. Mean ± standard deviation over layers and seeds."
    )
    return Picture("rank_in_use", caption, figure, [run for members in settings.values() for run in members])


def expert_load(group: Group) -> Picture | None:
    """How much more than its even share of tokens the busiest expert of a layer has, by depth."""
    runs = [run for run in group.runs if run.expert_loads]
    if not runs:
        return None
    settings = dict(list(_best_first(group, runs).items())[:MAX_LABELS])
    styles = looks(group, settings)
    figure, (axes,) = new_figure(group, "The load of experts", runs, height=4.8, width=8)
    for label, members in settings.items():
        values = defaultdict(list)
        for run in members:
            for name, load in run.expert_loads.items():
                values[_depth(name)].append(load)
        axes.plot(list(values), [float(numpy.mean(loads)) for loads in values.values()], label=label, **styles[label])
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    finish(axes, xlabel="block of the decoder", ylabel="busiest expert over its even share")
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=4
    )
    caption = (
        "Tokens of the busiest expert of each layer over the mean of the layer's experts, counted on the held-out "
        "samples after training: mean over seeds. On the line all experts of a layer have as many."
    )
    return Picture("expert_load", caption, figure, [run for members in settings.values() for run in members])


def _kind(name: str) -> str:
    """The last part of a linear's name, without the number of an expert."""
    return re.sub(r"\.\d+$", "", name).rpartition(".")[2]


def _depth(name: str) -> int | None:
    """The number in a layer's name; None without one."""
    return int(found[1]) if (found := re.search(r"\.(\d+)\.", name)) else None
