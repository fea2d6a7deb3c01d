"""Plan a run before anybody runs it: memory to the byte, FLOPs, hours, on one GPU and on many.

    python -m experiments.plan model=llama-65b +method=qlora rank=64 batch=1 seq=512
    python -m experiments.plan model=hf model.path=config.json +method=dora optim=adamw8bit gpu=a100 tokens=1e8
    python -m experiments.plan +method=qdora measure=true        the plan beside a real run on this machine
    python -m experiments.plan model=llama-7b +method=qlora plot=true

Every key of an experiment can be set (`--help`). No weights are read or made: see experiments/plan/simulate.py.
`python -m experiments.plan.claims` holds the same figures against published ones.
"""

from dataclasses import dataclass

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from experiments.config import Config
from experiments.errors import UserError
from experiments.plan.budget import budget
from experiments.plan.cards import card
from experiments.plan.measure import comparison, measure
from experiments.plan.plot import file_name, plot
from experiments.plan.table import heading, table
from experiments.runs.start import configured
from experiments.system import machine
from experiments.system.cli import hydra_command
from experiments.system.directory import results_directory


@dataclass
class PlanConfig(Config):
    batch: int = 1  # sequences of a forward pass on each GPU
    seq: int = 512  # tokens of a sequence
    gpus: int = 8  # plan for up to so many
    gpu: str = "h100"  # the one that hours are for: a key of experiments/plan/cards.py
    utilisation: float = 0.4  # share of its matrix units' peak that is reached
    tokens: float = 1e9  # to train on
    measure: bool = False  # make the run on this machine and compare; needs the model's weights
    plot: bool = False  # draw memory against rank, sequence length and model size


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


def _check(cfg: PlanConfig) -> None:
    for name in ("batch", "seq", "gpus", "tokens"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)}: choose 1 or more")
    if cfg.seq < 2:
        raise UserError("seq=1: a sequence of one token has none to predict")
    if not 0 < cfg.utilisation <= 1:
        raise UserError(f"utilisation={cfg.utilisation}: choose a share above 0, up to 1")
    if cfg.measure and cfg.plot:
        raise UserError("plot=true draws plans, and measure=true makes a run: leave one of them out")
    card(cfg.gpu)
    machine.check_dtype(cfg.trainer)


def plan(cfg: PlanConfig) -> str:
    """The text that the command prints."""
    _check(cfg)
    if cfg.measure:
        return _beside_a_run(cfg)
    dtype = torch.bfloat16 if cfg.trainer.dtype == "auto" else machine.DTYPES[cfg.trainer.dtype]
    needs = budget(cfg, dtype, cfg.batch, cfg.seq, cfg.gpus)
    text = f"{heading(cfg, dtype)}\n\n{table(cfg, needs)}"
    if not cfg.plot:
        return text
    with results_directory(cfg, (file_name(cfg),)):
        return f"{text}\n\nWritten: {plot(cfg, dtype, cfg.batch, cfg.seq, needs)}"


def _beside_a_run(cfg: PlanConfig) -> str:
    device, dtype = machine.set_up(cfg.trainer)
    needs = budget(cfg, dtype, cfg.batch, cfg.seq, on_cpu=device.type == "cpu")
    measured = measure(cfg, device, dtype, cfg.batch, cfg.seq)
    beside = comparison(needs, measured, cfg.trainer.gradient_checkpointing)
    return f"{heading(cfg, dtype)}\n{machine.describe(device, dtype)}\n\n{beside}"


@hydra_command("plan", PlanConfig)
def main(cfg: DictConfig) -> None:
    print(plan(configured(cfg)))


if __name__ == "__main__":
    main()
