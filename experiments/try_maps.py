"""Measure what tuned block sizes are worth: held-out loss beside uniform ones at the same bits.

    python -m experiments.tune_blocks output_dir=outputs/tuned
    python -m experiments.try_maps profile=outputs/tuned/profile.csv
    python -m experiments.try_maps profile=outputs/tuned/profile.csv data@second=text second.path=FILE

For every candidate block size the model is packed with it everywhere, and with the map that the profile gives for just
as many bits or fewer; also with the map for budget= or bits=, and with those in maps=. With alone=[64] each kind of
linear is packed alone as well, q_proj, k_proj and so on. All see the same held-out tokens, of the data and of the
second domain, so differences are of pairs: mean ± standard error over samples. How well the predicted rises agree with
the measured ones is printed too. Written to output_dir: the maps, trials.csv, trials.png.
"""

import csv
import io
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from scipy.stats import pearsonr, spearmanr

from experiments import machine
from experiments.block_choice import bits_per_weight, budget_bits, constant_bits, solve
from experiments.block_profile import Profile
from experiments.block_trials import Losses, Packable, measure
from experiments.cli import run_command
from experiments.config import DataConfig, QuantConfig, TrainerConfig
from experiments.data import load_data
from experiments.errors import UserError
from experiments.files import PROJECT_ROOT, writable_dir, write_atomically
from experiments.models import load_model
from experiments.progress import bar
from experiments.quant_map import QuantMap, blocksizes, write_map
from experiments.tune_blocks import SENSITIVITIES, TuneConfig, by_kind, check, load_profile, problem_of, share_of
from kernels.codebook import BLOCKSIZES

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # of Okabe and Ito's palette, distinct to colour-blind readers


@dataclass
class TrialConfig(TuneConfig):
    second: DataConfig = field(default_factory=lambda: DataConfig(name="none", source="none"))  # measured on as well
    maps: list[str] = field(default_factory=list)  # more maps to try
    alone: list[int] = field(default_factory=list)  # block sizes at which each kind of linear is packed alone
    batch_size: int = 16


ConfigStore.instance().store(name="try_maps_schema", node=TrialConfig)


@dataclass
class Trial:
    """One choice of block sizes.

    Attributes:
        kind: dense, uniform, tuned, map or alone.
        blocksizes: of each linear that is packed.
        constants: bits of all constants.
        beside: the uniform block size with as many bits or more that it is compared with.
        losses: by the name of the data.
    """

    title: str
    kind: str
    blocksizes: Mapping[str, int]
    constants: int = 0
    beside: int | None = None
    losses: dict[str, Losses] = field(default_factory=dict)


def plan(cfg: TrialConfig, profile: Profile) -> list[Trial]:
    """What is tried, the dense model first."""
    shapes, double = profile.shapes, cfg.quant.double

    def constants(choice: Mapping[str, int]) -> int:
        return sum(constant_bits(math.prod(shapes[name]), size, double) for name, size in choice.items())

    budget = budget_bits(shapes, share_of(cfg), cfg.bits)
    problem = problem_of(cfg, profile, budget)
    everywhere = [size for size in sorted(set(cfg.candidates)) if all(size in sizes for sizes in problem.bits.values())]
    uniform = [Trial(f"all {size}", "uniform", dict.fromkeys(shapes, size), beside=size) for size in everywhere]
    tuned = [
        Trial(f"tuned as {trial.beside}", "tuned", solve(problem_of(cfg, profile, constants(trial.blocksizes))))
        for trial in uniform
    ]
    tuned.append(Trial("tuned, budget", "tuned", solve(problem)))
    for file in cfg.maps:
        sizes = blocksizes(QuantConfig(name="tuned", map=file, double=double), shapes)
        tuned.append(Trial(Path(file).stem, "map", sizes))
    for trial in (*uniform, *tuned):
        trial.constants = constants(trial.blocksizes)
    for trial in tuned:
        fair = [other for other in uniform if other.constants >= trial.constants]
        trial.beside = min(fair, key=lambda other: other.constants).beside if fair else None
    return [Trial("dense", "dense", {}), *uniform, *tuned, *_alone(cfg, profile)]


def _alone(cfg: TrialConfig, profile: Profile) -> Iterator[Trial]:
    for size in cfg.alone:
        if size not in BLOCKSIZES:
            raise UserError(f"alone: {size} is no block size; choose from {', '.join(map(str, BLOCKSIZES))}")
        for kind, names in by_kind(profile.layers).items():
            fitting = {name: size for name in names if size in profile.layers[name].sizes}
            if fitting:
                yield Trial(f"only {kind} {size}", "alone", fitting)


def run_trials(cfg: TrialConfig, trials: list[Trial]) -> None:
    """Measure every trial's losses, on the data and on the second domain."""
    trainer = TrainerConfig(dtype=cfg.dtype)
    device = machine.pick_device(trainer)
    if device.type == "cpu":
        machine.set_up_cpu(trainer)
    dtype = machine.pick_dtype(trainer, device)
    print(f"trying {len(trials)} choices on {cfg.model.name}: {machine.describe(device, dtype)}")
    model, tokenizer = load_model(cfg.model, dtype, cfg.seed)
    measured_on = {}
    for data in (cfg.data, cfg.second):
        if data.source != "none":
            loaded = load_data(data, tokenizer)
            measured_on[data.name] = loaded.heldout
            print(loaded.note)
    packable = Packable(model.to(device), cfg.quant.double)
    known: dict[tuple, dict[str, Losses]] = {}  # at the ends of the range tuned and uniform are the same
    for trial in bar("trying")(trials):
        choice = tuple(trial.blocksizes.items())
        if choice not in known:
            packable.pack(trial.blocksizes)
            known[choice] = {
                name: measure(model, examples, cfg.batch_size, tokenizer.pad_token_id)
                for name, examples in measured_on.items()
            }
        trial.losses = known[choice]


def predicted_rise(profile: Profile, sensitivity: str, trial: Trial) -> float:
    """In nats a token by `fisher`, without a unit by `output`."""
    return sum(profile.layers[name].sizes[size][sensitivity] for name, size in trial.blocksizes.items())


def agreement(profile: Profile, dense: Trial, packed: list[Trial]) -> Iterator[str]:
    """Lines that say how well each sensitivity predicts the measured rises of the loss."""
    for sensitivity in SENSITIVITIES:
        predicted = [predicted_rise(profile, sensitivity, trial) for trial in packed]
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
    heads = "".join(f"{name:>16}{'above dense':>18}{'above uniform':>20}" for name in names)
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
                versus = "{:+.4f} ± {:.4f}".format(*trial.losses[name].above(uniform[trial.beside].losses[name]))
            line += f"{versus:>20}"
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


def plot(path: Path, model: str, profile: Profile, trials: list[Trial]) -> None:
    """Loss against bits a weight; below, what tuned maps differ from uniform block sizes by."""
    dense, *packed = trials
    names = list(dense.losses)
    uniform = {trial.beside: trial for trial in packed if trial.kind == "uniform"}
    figure = Figure(figsize=(6.2 * len(names), 6.6), layout="constrained")  # not pyplot, whose state a notebook shares
    figure.suptitle(f"{model} in NF4: block sizes tuned and uniform", fontsize="medium")
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
            bits = [bits_per_weight(profile.shapes, trial.constants) for trial in of_kind]
            style = {"color": colour, "marker": marker, "ls": line, "lw": 1.4, "label": kind}
            upper.plot(bits, [trial.losses[name].mean for trial in of_kind], **style)
            if kind == "uniform":
                for x, trial in zip(bits, of_kind):
                    upper.annotate(
                        str(trial.beside), (x, trial.losses[name].mean), (4, 4), textcoords="offset points", fontsize=8
                    )
                continue
            compared = [
                (x, *t.losses[name].above(uniform[t.beside].losses[name])) for x, t in zip(bits, of_kind) if t.beside
            ]
            x, y, error = zip(*compared)
            lower.errorbar(x, y, yerr=error, capsize=3, **style | {"ls": ""})
        upper.axhline(dense.losses[name].mean, color="0.4", ls="--", lw=1, label="dense")
        lower.axhline(0, color=BLUE, lw=1.4)
        upper.set(title=name, ylabel="held-out loss (nats a token)")
        lower.set(xlabel="bits a weight, constants included", ylabel="tuned − uniform\n(± standard error)")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
        upper.legend(frameon=False)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)


def try_maps(cfg: TrialConfig) -> str:
    """Do as `cfg` says, write everything to `cfg.output_dir`, return what the terminal shows.

    Raises:
        UserError: something in the configuration or the files it names is wrong; the message says what to do.
    """
    check(cfg)
    if cfg.batch_size < 1:
        raise UserError(f"batch_size={cfg.batch_size}: choose 1 or more")
    if not cfg.profile:
        raise UserError("no profile: python -m experiments.tune_blocks writes one: add profile=FILE")
    if cfg.second.name == cfg.data.name:
        raise UserError(f"data@second={cfg.second.name} is what data={cfg.data.name} already measures on")
    profile = load_profile(cfg)
    trials = plan(cfg, profile)
    run_trials(cfg, trials)
    text = table(profile, trials)
    directory = writable_dir(Path(cfg.output_dir), "set output_dir to a folder")
    for trial in trials:
        if trial.kind == "tuned":
            file = f"map_{trial.title.removeprefix('tuned').strip(', ').replace(' ', '_')}.yaml"
            write_map(directory / file, QuantMap(cfg.quant.double, profile.shapes, trial.blocksizes), trial.title)
    write_atomically(directory / "trials.csv", as_csv(profile, trials))
    plot(directory / "trials.png", cfg.model.name, profile, trials)
    return text


@hydra.main(version_base="1.3", config_path=str(PROJECT_ROOT / "conf"), config_name="try_maps")
def main(cfg: DictConfig) -> None:
    try:
        config: TrialConfig = OmegaConf.to_object(cfg)
        text = try_maps(config)
    except UserError as error:  # here, not in cli: Hydra would print a second message around it
        sys.exit(f"error: {error}")
    print(f"{text}\n\nWritten:", *sorted(Path(config.output_dir).iterdir()), sep="\n  ")


def cli() -> None:
    run_command(main)


if __name__ == "__main__":
    cli()
