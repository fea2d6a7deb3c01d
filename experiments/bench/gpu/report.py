"""The figures of a comparison on a GPU: which losses agree, the table of targets, CSV and picture."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from experiments.bench.gpu.stages import STEP, TARGETS, Case, Target
from experiments.system.files import write_atomically

TOLERANCE = 2e-2  # of a loss, relative: the same training in bf16 may differ so much by rounding
OF_THE_FALL = 0.25  # how far the losses fall over the steps may differ by so much: they begin at the same number
SAME_TOKENS = 0.75  # of the first tokens of a batch: others may be near ties


@dataclass(frozen=True)
class Row:
    """A line of the CSV file. `wall` metrics are medians of `count` samples; note: why there is none, or a warning."""

    case: str
    side: str
    metric: str
    p20: float | None
    p50: float | None
    p80: float | None
    count: int
    note: str
    card: str
    versions: str


@dataclass
class Results:
    """Figures by case, side and metric, and what has to hold before two of them are compared."""

    card: str
    device: str
    samples: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    losses: dict[tuple[Case, str], list[float]] = field(default_factory=dict)
    first_tokens: dict[tuple[Case, str, int], list[int]] = field(default_factory=dict)
    differ: dict[tuple[str, str], str] = field(default_factory=dict)  # (case, side): how, from ours
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # case, side, reason
    versions: dict[str, dict[str, str]] = field(default_factory=dict)  # of each side
    notes: list[str] = field(default_factory=list)

    def add(self, case: Case | str, side: str, metric: str, values: Sequence[float]) -> None:
        self.samples[str(case), side, metric] = list(values)

    def busy(self, case: Case, side: str, fields: dict) -> None:
        """Of trace.Busy: beside the wall time that is there already."""
        wall = self.median(case, side, STEP) / 1e3
        self.add(case, side, "gpu_busy_ms", [1e3 * fields["seconds"]])
        self.add(case, side, "gpu_idle_share", [max(0.0, 1 - fields["seconds"] / wall)])
        self.add(case, side, "kernels", [fields["kernels"]])
        self.add(case, side, "launches", [fields["launches"]])

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def failed(self, case: Case | str, side: str, reason: str) -> None:
        self.failures.append((str(case), side, reason))
        print(f"{case!s:<40} {side}: {reason}", flush=True)

    def median(self, case: Case | str, side: str, metric: str) -> float | None:
        values = self.samples.get((str(case), side, metric))
        return statistics.median(values) if values else None

    def compare(self, case: Case) -> None:
        """Hold the losses of each side to ours, step for step."""
        ours = self.losses.get((case, "ours"))
        for (case_, side), theirs in self.losses.items():
            if case_ != case or side == "ours":
                continue
            if ours is None:
                self.differ[str(case), side] = "ours has no losses"
            elif (reason := apart(ours, theirs)) is not None:
                self.differ[str(case), side] = reason

    def refusal(self, target: Target) -> str | None:
        """Why a target has no ratio; None if it has one."""
        for cell in (target.ours, target.other):
            name = str(cell.case)
            if self.median(cell.case, cell.side, cell.metric) is None:
                reasons = [r for case, side, r in self.failures if side == cell.side and case == name]
                return f"{cell.side}: {reasons[-1] if reasons else 'not measured'}"
            if (name, cell.side) in self.differ:
                return self.differ[name, cell.side]
        if target.at_least:
            rows = int(target.ours.metric.rpartition("_")[2])
            mine, other = (self.first_tokens[cell.case, cell.side, rows] for cell in (target.ours, target.other))
            same = sum(a == b for a, b in zip(mine, other))
            if same < SAME_TOKENS * rows:
                return f"{same} of {rows} first tokens are the same"
        return None

    def ratio(self, target: Target) -> float:
        mine, other = (self.median(cell.case, cell.side, cell.metric) for cell in (target.ours, target.other))
        return mine / other

    def show(self, case: Case | str) -> None:
        """Print the figures of a case."""
        for side in dict.fromkeys(side for name, side, _ in self.samples if name == str(case)):
            found = [
                f"{metric} {statistics.median(values):,.4g}"
                for (name, side_, metric), values in self.samples.items()
                if (name, side_) == (str(case), side)
            ]
            losses = self.losses.get((case, side), [])
            told = [f"losses {losses[0]:.3f} … {losses[-1]:.3f}"] if losses else []
            if reason := self.differ.get((str(case), side)):
                told.append(reason)
            print(f"{case!s:<40} {side:<8} {', '.join(found + told)}", flush=True)

    def told_versions(self) -> str:
        """Of all sides; a side whose packages are others than ours is named."""
        told = {}
        for side, packages in self.versions.items():
            for name, version in packages.items():
                told.setdefault(f"{name} {version}", []).append(side)
        everyone = len(self.versions)
        return ", ".join(what if len(who) == everyone else f"{what} ({', '.join(who)})" for what, who in told.items())


def apart(ours: Sequence[float], theirs: Sequence[float]) -> str | None:
    """How two trainings differ that begin alike; None if by no more than rounding explains."""
    for step, (a, b) in enumerate(zip(ours, theirs)):
        if not abs(a - b) <= TOLERANCE * abs(b):  # nor if one is not a number
            return f"the losses differ at step {step}: {a:.4f} and {b:.4f}"
    falls = ours[0] - ours[-1], theirs[0] - theirs[-1]
    if abs(falls[0] - falls[1]) > OF_THE_FALL * abs(falls[1]):
        return f"over {len(ours)} steps the loss falls by {falls[0]:.4f} and {falls[1]:.4f}"
    return None


def table(results: Results) -> list[str]:
    """A line for each target: the ratio, the limit, whether it is met."""
    lines = [f"{'ours over another':<50}{'ratio':>8}{'target':>10}  met"]
    for target in TARGETS:
        limit = f"{'≥' if target.at_least else '≤'} {target.limit:.3g}"
        reason = results.refusal(target)
        if reason is None:
            ratio = results.ratio(target)
            lines.append(f"{target.name:<50}{ratio:>8.3f}{limit:>10}  {'yes' if target.met(ratio) else 'no'}")
        else:
            lines.append(f"{target.name:<50}{'–':>8}{limit:>10}  – {reason}")
    return lines


def write(path: Path, results: Results) -> None:
    """The CSV file: all samples' quantiles, all losses, all failures, and the targets' ratios."""
    versions, rows = results.told_versions(), []

    def row(case: object, side: str, metric: str, values: Sequence[float] = (), note: str = "") -> None:
        quantiles = [None] * 3
        if values:
            at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
            quantiles = [round(q, 6) for q in torch.tensor(values, dtype=torch.float64).quantile(at).tolist()]
        rows.append(Row(str(case), side, metric, *quantiles, len(values), note, results.card, versions))

    for (case, side, metric), values in results.samples.items():
        row(case, side, metric, values, results.differ.get((case, side), ""))
    for (case, side), losses in results.losses.items():
        for step, loss in enumerate(losses):
            row(case, side, f"loss_{step}", [loss])
    for case, side, reason in results.failures:
        row(case, side, "failed", note=reason)
    for target in TARGETS:
        if results.refusal(target) is None:
            ratio = results.ratio(target)
            row(target.ours.case, "ours", f"ratio: {target.name}", [ratio], "met" if target.met(ratio) else "not met")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def plot(path: Path, results: Results) -> None:
    """A bar for each target that has a ratio, over its limit: left of 1 it is met."""
    from matplotlib.figure import Figure  # not pyplot: no display, and no global state

    there = [target for target in TARGETS if results.refusal(target) is None]
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(there)), layout="constrained")
    axes = figure.subplots()
    for y, target in enumerate(there):
        ratio = results.ratio(target)
        share = target.limit / ratio if target.at_least else ratio / target.limit
        axes.barh(y, share, color="#009e73" if target.met(ratio) else "#d55e00")  # Okabe and Ito's palette
        axes.text(share, y, f" {ratio:.3g} of {target.limit:.3g}", va="center", fontsize="small")
    axes.axvline(1, color="0.3", lw=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(there)), [target.name for target in there], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"ratio over its target on {results.card}: up to 1 it is met")
    axes.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
