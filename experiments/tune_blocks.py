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
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments.blocks.choice import (
    Problem,
    bits_per_weight,
    code_bits,
    solve,
    solve_greedily,
)
from experiments.blocks.profile import Calibration, Profile, profile_model, write_profile
from experiments.blocks.quant_map import QuantMap, write_map
from experiments.blocks.tuning import TuneConfig, budget_of, by_kind, check, load_profile, options, problem_of
from experiments.config import TrainerConfig
from experiments.data.samples import load_data
from experiments.models.architecture import architecture_for_heads
from experiments.models.load import load_model, take_experts
from experiments.system import machine
from experiments.system.cli import hydra_command
from experiments.system.directory import results_directory
from experiments.system.progress import bar
from modules import decoder_linears
from modules.adapters.base_print import base_print
from modules.linear import weight_shape

MAP, PROFILE = "map.yaml", "profile.csv"  # in output_dir

ConfigStore.instance().store(name="tune_blocks_schema", node=TuneConfig)


def measure_profile(cfg: TuneConfig) -> Profile:
    """Profile the configured model on its calibration samples."""
    trainer = TrainerConfig(dtype=cfg.dtype)
    device, dtype = machine.set_up(trainer)
    print(f"profiling {cfg.model.name}: {machine.describe(device, dtype)}")
    model, tokenizer = load_model(cfg.model, dtype, cfg.seed)
    take_experts(model)
    shapes = {name: weight_shape(linear) for name, linear in decoder_linears(model).items()}
    architecture = architecture_for_heads(cfg.model, cfg.quant.align)
    options(cfg, shapes, budget_of(cfg, shapes), architecture)  # finds minutes earlier that there are none
    examples = load_data(cfg.data, tokenizer).train[: cfg.samples]
    calibration = Calibration(model.to(device))
    calibration.see(examples, torch.Generator().manual_seed(cfg.seed), bar("calibrating"))
    layers = profile_model(calibration, cfg.quant.double, cfg.quant.type, bar("profiling"))
    about = {
        "model": cfg.model.path or cfg.model.name,
        "base": base_print(model),
        "data": cfg.data.path or cfg.data.name,
        "samples": len(examples),
        "tokens": calibration.tokens,
        "type": cfg.quant.type,
        "double": cfg.quant.double,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Profile(about, layers)


def tune(cfg: TuneConfig) -> str:
    """Do as `cfg` says, write everything to `cfg.output_dir`, return the text for the terminal.

    Raises:
        UserError: the configuration or a file that it names is wrong; the message says how to repair it.
    """
    check(cfg)
    profile = load_profile(cfg) if cfg.profile else measure_profile(cfg)
    architecture = architecture_for_heads(cfg.model, cfg.quant.align)
    problem = problem_of(cfg, profile, budget_of(cfg, profile.shapes), architecture)
    best = solve(problem)
    text = table(cfg, profile, problem, best)
    directory = Path(cfg.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    if not cfg.profile:
        write_profile(directory / PROFILE, profile)
    write_map(directory / MAP, QuantMap(cfg.quant.double, profile.shapes, best, profile.base), text)
    return text


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


@hydra_command("tune_blocks", TuneConfig)
def main(cfg: DictConfig) -> None:
    config: TuneConfig = OmegaConf.to_object(cfg)
    with results_directory(config, (MAP,) if config.profile else (MAP, PROFILE)):
        text = tune(config)
    print(f"{text}\n\nWritten:", *sorted(Path(config.output_dir).iterdir()), sep="\n  ")


if __name__ == "__main__":
    main()
