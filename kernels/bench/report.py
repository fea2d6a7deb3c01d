"""Results as text in the terminal, as CSV and as plots."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.bench.runner import COLUMNS, Case, Row
from kernels.bench.spec import Bench

# Okabe and Ito's palette and a marker each: distinct to colour-blind readers and in grey
STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"))


def varied(bench: Bench, config: Mapping[str, Any]) -> str:
    """The settings by which `config` differs from the benchmark's other configurations."""
    keys = [key for key in config if len({other[key] for other in bench.configs}) > 1]
    return " ".join(config[key] if isinstance(config[key], str) else f"{key}={config[key]}" for key in keys)


def title(bench: Bench) -> str:
    """The op, and the settings that all its configurations share."""
    first = bench.configs[0]
    shared = [f"{key}={first[key]}" for key in first if len({other[key] for other in bench.configs}) == 1]
    return ", ".join([bench.kernel, bench.mode, *shared])


class Table:
    """The terminal's table of one benchmark, printed case by case."""

    def __init__(self, bench: Bench, graphs: bool = False):
        self.bench, self.graphs = bench, graphs
        self.width = max(len("config"), *(len(varied(bench, config)) for config in bench.configs))
        self.provider_width = max(map(len, bench.providers))

    def header(self) -> str:
        unit = self.bench.unit
        return (
            f"\n{title(self.bench)}\n"
            f"{'config':<{self.width}}  {unit + 's':>11}  {'provider':<{self.provider_width}}"
            f"{'ns/' + unit:>12}{'20–80 %':>24}{'time/ours':>11}{'roofline':>10}"
            + (f"{'graph ns':>12}{'graph/ours':>12}{'roofline':>10}" if self.graphs else "")
            + (f"{'weights, MB':>14}{'peak, MB':>14}" if self.bench.weights else "")
        )

    def lines(self, case: Case) -> list[str]:
        rows = {(row.provider, row.metric): row for row in case.rows}
        ours = {metric: row.p50 for (provider, metric), row in rows.items() if provider == "ours"}
        texts = [
            self._numbers(row, ours.get(metric))
            + self._graph(rows.get((provider, "graph_ns")), ours.get("graph_ns"))
            + "".join(f"{n_bytes / 1e6:>14,.1f}" for n_bytes in case.memory.get(provider, ()))
            for (provider, metric), row in rows.items()
            if metric == "time_ns"
        ]
        texts += [f"{name:<{self.provider_width}}  no time: {why}" for name, why in case.refused.items()]
        label = f"{varied(self.bench, case.config):<{self.width}}  {case.x:>11,}"
        return [f"{label if i == 0 else '':<{len(label)}}  {text}" for i, text in enumerate(texts)]

    def _numbers(self, row: Row, ours: float | None) -> str:
        low, middle, high = (f"{t / row.x:,.{_digits(row.p50 / row.x)}f}" for t in (row.p20, row.p50, row.p80))
        ratio = f"{row.p50 / ours:.2f}" if ours else ""
        return (
            f"{row.provider:<{self.provider_width}}{middle:>12}{low + ' – ' + high:>24}"
            f"{ratio:>11}{row.roofline_share:>10.1%}"
        )

    def _graph(self, row: Row | None, ours: float | None) -> str:
        if row is None:
            return ""
        middle = row.p50 / row.x
        ratio = f"{row.p50 / ours:.2f}" if ours else ""
        return f"{middle:>12,.{_digits(middle)}f}{ratio:>12}{row.roofline_share:>10.1%}"


def _digits(value: float) -> int:
    return 3 if value < 10 else 1 if value < 1000 else 0


class CsvFile:
    """The results as CSV, whole after every row: an interrupted run keeps its measurements."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writeheader()

    def add(self, rows: tuple[Row, ...]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerows(asdict(row) for row in rows)


def plot(bench: Bench, rows: list[Row], directory: Path) -> Path:
    """Draw <kernel>.png: time a weight or token against size, one panel a configuration, with the roofline."""
    from matplotlib import ticker
    from matplotlib.figure import Figure  # not pyplot: no display, and no global state

    measured = {row.config for row in rows}
    metric = "graph_ns" if any(row.metric == "graph_ns" for row in rows) else "time_ns"
    configs = [config for config in bench.configs if json.dumps(config) in measured]
    figure = Figure(figsize=(1.4 + 2.8 * len(configs), 4.2), layout="constrained")
    panels = figure.subplots(1, len(configs), sharey=True, squeeze=False)
    for axes, config in zip(panels[0], configs):
        here = [row for row in rows if row.config == json.dumps(config) and row.metric == metric]
        for name, (colour, marker) in zip(bench.providers, STYLES):
            _draw(axes, [row for row in here if row.provider == name], name, colour, marker)
        floor = {row.x: row.roofline_share * row.p50 / row.x for row in here}
        axes.plot(floor.keys(), floor.values(), color="0.5", ls="--", lw=1, label="roofline")
        axes.set(title=varied(bench, config), xlabel=f"{bench.unit}s", xscale="log", yscale="log")
        axes.set_xticks(list(floor), [f"{x:,}" for x in floor])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"ns a {bench.unit} (median, 20–80 %)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{title(bench)}\n{rows[0].device}", fontsize="medium")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{bench.kernel}.png"
    figure.savefig(path, dpi=130)
    return path


def _draw(axes, rows: list[Row], name: str, colour: str, marker: str) -> None:
    x = [row.x for row in rows]
    middle = [row.p50 / row.x for row in rows]
    spread = [[(row.p50 - row.p20) / row.x for row in rows], [(row.p80 - row.p50) / row.x for row in rows]]
    axes.errorbar(x, middle, yerr=spread, color=colour, marker=marker, ms=5, lw=1.4, capsize=3, label=name)
