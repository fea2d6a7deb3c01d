"""Choose a block size for each linear of a model.

    python -m experiments.tune_blocks model=smollm2 budget=0.05 candidates=[32,64,128,256,512,1024,4096]
    python -m experiments.run +method=qdora quant=tuned quant.map=outputs/…/map.yaml
    python -m experiments.tune_blocks profile=outputs/…/profile.csv bits=4.127         another budget, in a second

Smaller blocks lose less and cost more constants. Every linear is profiled on calibration samples
(experiments/blocks/profile.py); then the sizes are chosen that give the least predicted rise of the loss under the
budget (experiments/blocks/choice.py). Written to output_dir: map.yaml, and profile.csv unless it was given.
experiments.try_maps measures whether the prediction holds.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments.blocks.choice import (
    Problem,
    allowed_sizes,
    bits_per_weight,
    budget_bits,
    code_bits,
    option_bits,
    pose,
    solve,
    solve_greedily,
)
from experiments.blocks.profile import SENSITIVITIES, Calibration, Profile, profile_model, read_profile, write_profile
from experiments.blocks.quant_map import QuantMap, Shapes, write_map
from experiments.config import DataConfig, ModelConfig, TrainerConfig
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.architecture import load_architecture
from experiments.models.load import load_model
from experiments.system import machine
from experiments.system.cli import run_command
from experiments.system.files import PROJECT_ROOT, writable_dir
from experiments.system.progress import bar
from kernels.codebook import CODEBOOKS
from modules import decoder_linears
from modules.linear import weight_shape

DEFAULT_BUDGET = 0.05


@dataclass
class Packing:
    type: str = "nf4"  # nf4 | fp4 | int4
    double: bool = True  # absmax in 8 bits
    align: str = "none"  # none | row | head: what blocks must not run across


@dataclass
class TuneConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)  # whose training part calibrates
    quant: Packing = field(default_factory=Packing)
    candidates: list[int] = field(default_factory=list)  # block sizes to choose from
    budget: float | None = None  # for all constants: a share of the bytes of the codes
    bits: float | None = None  # or bits a weight, codes included
    sensitivity: str = "fisher"  # fisher | output: what predicts the rise of the loss
    samples: int = 128  # calibration samples
    profile: str | None = None  # a profile.csv of an earlier call, instead of measuring
    dtype: str = "auto"  # that the model computes in, and is packed from
    seed: int = 0
    output_dir: str = ""


ConfigStore.instance().store(name="tune_blocks_schema", node=TuneConfig)


def check(cfg: TuneConfig) -> None:
    """Raise UserError for values that the schema's types cannot exclude."""
    if cfg.sensitivity not in SENSITIVITIES:
        raise UserError(f"sensitivity={cfg.sensitivity}: choose {' or '.join(SENSITIVITIES)}")
    if cfg.quant.type not in CODEBOOKS:
        raise UserError(f"quant.type={cfg.quant.type}: choose {', '.join(CODEBOOKS)}")
    if cfg.budget is not None and cfg.bits is not None:
        raise UserError(f"budget={cfg.budget:g} and bits={cfg.bits:g} are two budgets: choose one")
    if cfg.budget is not None and not 0 < cfg.budget < 1:
        raise UserError(f"budget={cfg.budget:g} is a share of the codes' bytes: choose one between 0 and 1")
    if cfg.samples < 1:
        raise UserError(f"samples={cfg.samples}: choose 1 or more")


def budget_of(cfg: TuneConfig, shapes: Shapes) -> int:
    """The most bits that all constants may take."""
    return budget_bits(shapes, DEFAULT_BUDGET if cfg.budget is None else cfg.budget, cfg.bits)


def options(cfg: TuneConfig, shapes: Shapes, budget: int) -> dict[str, dict[int, int]]:
    """The block sizes that each linear may have, with the bits of its constants.

    Raises:
        UserError: there are none, or none that meet the budget.
    """
    architecture = load_architecture(cfg.model) if cfg.quant.align == "head" else None
    allowed = allowed_sizes(shapes, cfg.candidates, cfg.quant.align, architecture)
    return option_bits(shapes, allowed, cfg.quant.double, budget)


def measure_profile(cfg: TuneConfig) -> Profile:
    """Profile the configured model on its calibration samples."""
    trainer = TrainerConfig(dtype=cfg.dtype)
    device = machine.pick_device(trainer)
    if device.type == "cpu":
        machine.set_up_cpu(trainer)
    dtype = machine.pick_dtype(trainer, device)
    print(f"profiling {cfg.model.name}: {machine.describe(device, dtype)}")
    model, tokenizer = load_model(cfg.model, dtype, cfg.seed)
    shapes = {name: weight_shape(linear) for name, linear in decoder_linears(model).items()}
    options(cfg, shapes, budget_of(cfg, shapes))  # minutes before it would be found that there are none
    examples = load_data(cfg.data, tokenizer).train[: cfg.samples]
    calibration = Calibration(model.to(device))
    calibration.see(examples, torch.Generator().manual_seed(cfg.seed), bar("calibrating"))
    layers = profile_model(calibration, cfg.quant.double, cfg.quant.type, bar("profiling"))
    about = {
        "model": cfg.model.path or cfg.model.name,
        "data": cfg.data.path or cfg.data.name,
        "samples": len(examples),
        "tokens": calibration.tokens,
        "type": cfg.quant.type,
        "double": cfg.quant.double,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Profile(about, layers)


def load_profile(cfg: TuneConfig) -> Profile:
    """The profile that `cfg.profile` names.

    Raises:
        UserError: it is of another model, or of other constants.
    """
    profile = read_profile(Path(cfg.profile))
    model = cfg.model.path or cfg.model.name
    wanted = {"model": model, "quant.type": cfg.quant.type, "quant.double": cfg.quant.double}
    for key, value in wanted.items():
        if (there := profile.about[key.rpartition(".")[2]]) != value:
            raise UserError(
                f"profile={cfg.profile} is of {key}={_shown(there)}, not {_shown(value)}: set it so, or leave profile "
                "out to measure anew"
            )
    return profile


def _shown(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()  # as the command line has it


def problem_of(cfg: TuneConfig, profile: Profile, budget: int) -> Problem:
    """The choice that `cfg` asks for, with at most `budget` bits of constants."""
    return pose(options(cfg, profile.shapes, budget), profile.rises(cfg.sensitivity), budget)


def tune(cfg: TuneConfig) -> str:
    """Do as `cfg` says, write everything to `cfg.output_dir`, return what the terminal shows.

    Raises:
        UserError: something in the configuration or the files it names is wrong; the message says what to do.
    """
    check(cfg)
    profile = load_profile(cfg) if cfg.profile else measure_profile(cfg)
    problem = problem_of(cfg, profile, budget_of(cfg, profile.shapes))
    best = solve(problem)
    text = table(cfg, profile, problem, best)
    directory = writable_dir(Path(cfg.output_dir), "set output_dir to a folder")
    if not cfg.profile:
        write_profile(directory / "profile.csv", profile)
    write_map(directory / "map.yaml", QuantMap(cfg.quant.double, profile.shapes, best), text)
    return text


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Full names of linears by their last part, such as q_proj."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return kinds


def table(cfg: TuneConfig, profile: Profile, problem: Problem, best: Mapping[str, int]) -> str:
    """The linears by kind with the sizes chosen, and the choice beside the greedy one and uniform block sizes."""
    about = profile.about
    double = "8 bits" if cfg.quant.double else "fp32"
    on = f"{about['samples']} samples ({about['tokens']:,} labelled tokens) of {about['data']}"
    lines = [f"{about['model']} in {about['type']}, absmax in {double}, profiled on {on}", ""]
    sizes = sorted({size for rises in problem.rises.values() for size in rises})
    lines.append(
        f"{'linears':<20}{'weights':>12}{'kurtosis':>10}{'outliers':>10}{'spread':>9}{'error':>8}   "
        "how many with blocks of"
    )
    lines.append(f"{'':<61}{'at 64':>8}   " + "".join(f"{size:>6}" for size in sizes))
    for kind, names in by_kind(best).items():
        layers = [profile.layers[name] for name in names]
        counts = Counter(best[name] for name in names)
        mean = {key: sum(getattr(layer, key) for layer in layers) / len(layers) for key in ("kurtosis", "outliers")}
        at_64 = [layer.sizes[min(64, max(layer.sizes))] for layer in layers]
        mean |= {key: sum(values[key] for values in at_64) / len(layers) for key in ("spread", "error")}
        lines.append(
            f"{f'{len(names)} {kind}':<20}{sum(math.prod(layer.shape) for layer in layers):>12,}"
            f"{mean['kurtosis']:>10.2f}{mean['outliers']:>10.3%}{mean['spread']:>9.2f}{mean['error']:>8.2%}   "
            + "".join(f"{counts[size] or '·':>6}" for size in sizes)
        )
    unit = "predicted rise (nats a token)" if cfg.sensitivity == "fisher" else "sum of relative output errors"
    lines += ["", f"{'':<20}{'bits a weight':>15}{'constants / codes':>20}   {unit}"]
    uniform = {
        f"all {size}": dict.fromkeys(best, size)
        for size in sizes
        if all(size in rises for rises in problem.rises.values())
    }
    for title, choice in (uniform | {"greedy": solve_greedily(problem), "tuned": best}).items():
        spent = problem.spent(choice)
        bits, share = bits_per_weight(profile.shapes, spent), spent / code_bits(profile.shapes)
        lines.append(f"{title:<20}{bits:>15.4f}{share:>20.2%}   {problem.rise(choice):.6g}")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path=str(PROJECT_ROOT / "conf"), config_name="tune_blocks")
def main(cfg: DictConfig) -> None:
    try:
        config: TuneConfig = OmegaConf.to_object(cfg)
        text = tune(config)
    except UserError as error:  # here, not in cli: Hydra would print a second message around it
        sys.exit(f"error: {error}")
    print(f"{text}\n\nWritten:", *sorted(Path(config.output_dir).iterdir()), sep="\n  ")


def cli() -> None:
    run_command(main)


if __name__ == "__main__":
    cli()
