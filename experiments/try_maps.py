"""Compare tuned block sizes with uniform ones at the same bits, by held-out loss.

    python -m experiments.tune_blocks output_dir=outputs/tuned
    python -m experiments.try_maps profile=outputs/tuned/profile.csv
    python -m experiments.try_maps profile=outputs/tuned/profile.csv data@second=text second.path=FILE

For every candidate block size the model is packed with it everywhere, and with the map that the profile gives for just
as many bits or fewer; also with the map for budget= or bits=, and with those in maps=. With alone=[64] each kind of
linear is packed alone as well, q_proj, k_proj and so on. All see the same held-out tokens, of the data and of the
second domain, so differences are of pairs: mean ± standard error over samples. How well the predicted rises agree with
the measured ones is printed too. Written to output_dir: the maps, trials.csv, trials.png.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from experiments.blocks.choice import constant_bits, solve
from experiments.blocks.profile import Profile
from experiments.blocks.quant_map import QuantMap, Shapes, blocksizes, write_map
from experiments.blocks.report import as_csv, plot, table
from experiments.blocks.trials import Losses, Packable, Trial, measure
from experiments.blocks.tuning import TuneConfig, budget_of, by_kind, check, load_profile, problem_of
from experiments.config import DataConfig, QuantConfig, TrainerConfig
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.architecture import architecture_for_heads
from experiments.models.load import load_model, take_experts
from experiments.system import machine
from experiments.system.cli import hydra_command
from experiments.system.directory import clear, results_directory
from experiments.system.files import write_atomically
from experiments.system.progress import bar
from kernels.codebook import BLOCKSIZES
from modules import decoder_linears
from modules.linear import weight_shape

FILES = ("map_*.yaml", "trials.csv", "trials.png")


@dataclass
class TrialConfig(TuneConfig):
    second: DataConfig = field(default_factory=lambda: DataConfig(name="none", source="none"))  # measured on as well
    maps: list[str] = field(default_factory=list)  # more maps to try
    alone: list[int] = field(default_factory=list)  # block sizes at which each kind of linear is packed alone
    batch_size: int = 16  # samples at once


ConfigStore.instance().store(name="try_maps_schema", node=TrialConfig)


def plan(cfg: TrialConfig, profile: Profile) -> list[Trial]:
    """Every choice to try, the dense model first."""
    shapes, double = profile.shapes, cfg.quant.double

    def constants(choice: Mapping[str, int]) -> int:
        return sum(constant_bits(math.prod(shapes[name]), size, double) for name, size in choice.items())

    architecture = architecture_for_heads(cfg.model, cfg.quant.align)
    problem = problem_of(cfg, profile, budget_of(cfg, shapes), architecture)
    everywhere = [size for size in sorted(set(cfg.candidates)) if all(size in sizes for sizes in problem.bits.values())]
    uniform = [Trial(f"all {size}", "uniform", dict.fromkeys(shapes, size), beside=size) for size in everywhere]
    tuned = [
        Trial(
            f"tuned as {trial.beside}",
            "tuned",
            solve(problem_of(cfg, profile, constants(trial.blocksizes), architecture)),
        )
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
            raise UserError(f"alone: {size} is not a block size; choose from {', '.join(map(str, BLOCKSIZES))}")
        for kind, names in by_kind(profile.layers).items():
            fitting = {name: size for name in names if size in profile.layers[name].sizes}
            if fitting:
                yield Trial(f"only {kind} {size}", "alone", fitting)


def run_trials(cfg: TrialConfig, shapes: Shapes, trials: list[Trial]) -> None:
    """Measure every trial's losses, on the data and on the second domain.

    Raises:
        UserError: the model's linears do not have `shapes`; there are no data.
    """
    trainer = TrainerConfig(dtype=cfg.dtype)
    device, dtype = machine.set_up(trainer)
    print(f"trying {len(trials)} choices on {cfg.model.name}: {machine.describe(device, dtype)}")
    model, tokenizer = load_model(cfg.model, dtype, cfg.seed)
    take_experts(model)
    if shapes != {name: weight_shape(linear) for name, linear in decoder_linears(model).items()}:
        raise UserError(f"profile={cfg.profile} has other linears than {cfg.model.name}: measure a new one")
    measured_on = {}
    for data in (cfg.data, cfg.second):
        if data.source != "none":
            loaded = load_data(data, tokenizer)
            measured_on[data.name] = loaded.heldout
            print(loaded.note)
    packable = Packable(model.to(device), cfg.quant.double, cfg.quant.type)
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
        tqdm.write(f"{trial.title}: " + ", ".join(f"{name} {losses.mean:.4f}" for name, losses in trial.losses.items()))


def try_maps(cfg: TrialConfig) -> str:
    """Do as `cfg` says, write everything to `cfg.output_dir`, return the text for the terminal.

    Raises:
        UserError: the configuration or a file that it names is wrong; the message says how to repair it.
    """
    check(cfg)
    if cfg.batch_size < 1:
        raise UserError(f"batch_size={cfg.batch_size}: choose 1 or more")
    if not cfg.profile:
        raise UserError("no profile: python -m experiments.tune_blocks writes one: add profile=FILE")
    if cfg.second.name == cfg.data.name:
        raise UserError(
            f"data@second={cfg.second.name} is the same data as data={cfg.data.name}: choose another, or leave it out"
        )
    profile = load_profile(cfg)
    trials = plan(cfg, profile)
    run_trials(cfg, profile.shapes, trials)
    text = table(profile, trials)
    directory = Path(cfg.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    clear(directory, FILES)
    for trial in trials:
        if trial.kind == "tuned":
            file = f"map_{trial.title.removeprefix('tuned').strip(', ').replace(' ', '_')}.yaml"
            quant_map = QuantMap(cfg.quant.double, profile.shapes, trial.blocksizes, profile.base)
            write_map(directory / file, quant_map, trial.title)
    write_atomically(directory / "trials.csv", as_csv(profile, trials))
    plot(directory / "trials.png", f"{cfg.model.name} in {cfg.quant.type}", profile, trials)
    return text


@hydra_command("try_maps", TrialConfig)
def main(cfg: DictConfig) -> None:
    config: TrialConfig = OmegaConf.to_object(cfg)
    with results_directory(config, FILES):
        text = try_maps(config)
    print(f"{text}\n\nWritten:", *sorted(Path(config.output_dir).iterdir()), sep="\n  ")


if __name__ == "__main__":
    main()
