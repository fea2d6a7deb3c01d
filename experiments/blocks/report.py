"""The results of trials of block sizes: a table, a CSV, a picture. The first trial is the dense model."""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy.stats import pearsonr, spearmanr

from experiments.blocks.choice import bits_per_weight
from experiments.blocks.profile import SENSITIVITIES, Profile
from experiments.blocks.trials import Trial
from experiments.system.files import write_figure
from experiments.system.palette import BLUE, GREEN, ORANGE


def predicted_rise(profile: Profile, sensitivity: str, trial: Trial) -> float:
    """In nats a token by `fisher`, without a unit by `output`."""
    return sum(profile.layers[name].sizes[size][sensitivity] for name, size in trial.blocksizes.items())


def agreement(profile: Profile, dense: Trial, packed: list[Trial]) -> Iterator[str]:
    """Lines that say how well each sensitivity predicts the measured rises of the loss."""
    for sensitivity in SENSITIVITIES:
        predicted = [predicted_rise(profile, sensitivity, trial) for trial in packed]
        if len(set(predicted)) < 3:  # of two points any correlation is 1
            continue
        for name in dense.losses:
            measured = [trial.losses[name].above(dense.losses[name])[0] for trial in packed]
            line = f"  {sensitivity:<8}{name:<14}Spearman {spearmanr(predicted, measured).statistic:.2f}, Pearson "
            line += f"{pearsonr(predicted, measured).statistic:.2f}"
            if sensitivity == "fisher":
                line += f"; measured / predicted {sum(measured) / sum(predicted):.2f}"
            yield line


def table(profile: Profile, trials: list[Trial]) -> str:
    """The trials as the terminal shows them."""
    dense, *packed = trials
    uniform = {trial.beside: trial for trial in packed if trial.kind == "uniform"}
    names = list(dense.losses)
    heads = "".join(f"{name:>16}{'above dense':>18}{'beside uniform':>26}" for name in names)
    lines = [f"{'held-out loss':<18}{'bits':>8}{heads}"]
    for trial in trials:
        line = f"{trial.title:<26}"
        if trial.constants:
            line = f"{trial.title:<18}{bits_per_weight(profile.shapes, trial.constants):>8.4f}"
        for name in names:
            line += f"{trial.losses[name].mean:>16.4f}"
            if trial.kind != "dense":
                line += "{:>10.4f} ± {:.4f}".format(*trial.losses[name].above(dense.losses[name])).rjust(18)
            versus = ""
            if trial.kind in ("tuned", "map") and trial.beside:
                above = trial.losses[name].above(uniform[trial.beside].losses[name])
                versus = "{}: {:+.4f} ± {:.4f}".format(trial.beside, *above)
            line += f"{versus:>26}"
        lines.append(line.rstrip())
    maps, alone = ([trial for trial in packed if (trial.kind == "alone") is flag] for flag in (False, True))
    lines += ["", f"predicted and measured rise of the loss over these {len(maps)} choices:"]
    lines += agreement(profile, dense, maps)
    if alone:
        lines += [f"and over {len(alone)} of one kind of linear alone:", *agreement(profile, dense, alone)]
    return "\n".join(lines)


def as_csv(profile: Profile, trials: list[Trial]) -> str:
    """A row a trial."""
    dense = trials[0]
    uniform = {trial.beside: trial for trial in trials if trial.kind == "uniform"}
    text = io.StringIO()
    columns = [f"{key}_{name}" for name in dense.losses for key in ("loss", "rise", "rise_se", "above", "above_se")]
    predictions = [f"predicted_{sensitivity}" for sensitivity in SENSITIVITIES]
    writer = csv.DictWriter(
        text, ["title", "kind", "bits_per_weight", "beside", *columns, *predictions], lineterminator="\n"
    )
    writer.writeheader()
    for trial in trials:
        row = {"title": trial.title, "kind": trial.kind, "beside": trial.beside}
        if trial.constants:
            row["bits_per_weight"] = bits_per_weight(profile.shapes, trial.constants)
        for name, losses in trial.losses.items():
            row[f"loss_{name}"] = losses.mean
            row[f"rise_{name}"], row[f"rise_se_{name}"] = losses.above(dense.losses[name])
            if trial.beside:
                row[f"above_{name}"], row[f"above_se_{name}"] = losses.above(uniform[trial.beside].losses[name])
        row |= {
            f"predicted_{sensitivity}": predicted_rise(profile, sensitivity, trial) for sensitivity in SENSITIVITIES
        }
        writer.writerow(row)
    return text.getvalue()


def plot(path: Path, what: str, profile: Profile, trials: list[Trial]) -> None:
    """Loss against bits a weight; below, the difference between tuned maps and uniform block sizes."""
    dense, *packed = trials
    names = list(dense.losses)
    uniform = {trial.beside: trial for trial in packed if trial.kind == "uniform"}
    weights = sum(map(math.prod, profile.shapes.values()))
    figure = Figure(figsize=(6.2 * len(names), 6.6), layout="constrained")  # not pyplot, whose state a notebook shares
    figure.suptitle(f"{what}: block sizes tuned and uniform", fontsize="medium")
    panels = figure.subplots(2, len(names), squeeze=False, sharex=True, height_ratios=(2, 1))
    for name, upper, lower in zip(names, *panels):
        for kind, colour, marker, line in (
            ("uniform", BLUE, "o", "-"),
            ("tuned", ORANGE, "D", "-"),
            ("map", GREEN, "^", ""),
        ):
            of_kind = sorted((trial for trial in packed if trial.kind == kind), key=lambda trial: trial.constants)
            if not of_kind:
                continue
            x_of_kind = [trial.constants / weights for trial in of_kind]
            style = {"color": colour, "marker": marker, "ls": line, "lw": 1.4, "label": kind}
            upper.plot(x_of_kind, [trial.losses[name].mean for trial in of_kind], **style)
            if kind == "uniform":
                for x, trial in zip(x_of_kind, of_kind):
                    upper.annotate(
                        str(trial.beside), (x, trial.losses[name].mean), (4, 4), textcoords="offset points", fontsize=8
                    )
                continue
            for x, trial in zip(x_of_kind, of_kind):
                if trial.beside:
                    difference, error = trial.losses[name].above(uniform[trial.beside].losses[name])
                    lower.errorbar(x, difference, yerr=error, capsize=3, **style | {"ls": ""})
        upper.axhline(dense.losses[name].mean, color="0.4", ls="--", lw=1, label="dense")
        lower.axhline(0, color=BLUE, lw=1.4)
        upper.set(title=name, ylabel="held-out loss (nats a token)")
        lower.set_xscale("log", base=2)
        bits = [f"{bits_per_weight(profile.shapes, trial.constants):.3f}" for trial in uniform.values()]
        lower.set_xticks([trial.constants / weights for trial in uniform.values()], bits)
        lower.xaxis.set_minor_locator(NullLocator())
        lower.set(xlabel="bits a weight with constants, whose logarithm is the axis")
        lower.set(ylabel="tuned − uniform\n(± standard error)")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
        upper.legend(frameon=False)
    write_figure(path, figure)
