"""A request to choose block sizes, as tune_blocks and try_maps take it: its keys, its checks, the problem it poses."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedConfig

from experiments.blocks.choice import Problem, allowed_sizes, budget_bits, option_bits, pose
from experiments.blocks.profile import SENSITIVITIES, Profile, read_profile
from experiments.blocks.quant_map import Shapes
from experiments.config import DataConfig, ModelConfig
from experiments.errors import UserError
from kernels.codebook import BLOCK_FORMATS, CODEBOOKS

DEFAULT_BUDGET = 0.05


@dataclass
class Packing:
    type: str = "nf4"  # nf4 | fp4 | int4
    double: bool = True  # absmax in 8 bits
    align: str = "none"  # none | row | head: blocks must not run across it


@dataclass
class TuneConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)  # whose training part calibrates
    quant: Packing = field(default_factory=Packing)
    candidates: list[int] = field(default_factory=list)  # block sizes to choose from
    budget: float | None = None  # for all constants: a share of the bytes of the codes
    bits: float | None = None  # or bits a weight, codes included
    sensitivity: str = "fisher"  # fisher | output: predicts the rise of the loss
    samples: int = 128  # calibration samples
    profile: str | None = None  # a profile.csv of an earlier call, instead of measuring
    dtype: str = "auto"  # that the model computes in, and is packed from
    seed: int = 0  # of the choice of samples
    output_dir: str = ""  # where to write
    overwrite: bool = False  # replace the results of an earlier run in output_dir


def check(cfg: TuneConfig) -> None:
    """Raise UserError for values that the schema's types cannot exclude."""
    if cfg.sensitivity not in SENSITIVITIES:
        raise UserError(f"sensitivity={cfg.sensitivity}: choose {' or '.join(SENSITIVITIES)}")
    if cfg.quant.type in BLOCK_FORMATS:
        raise UserError(
            f"quant.type={cfg.quant.type}: its blocks have one size, so there is nothing to choose: take "
            f"{', '.join(CODEBOOKS)}"
        )
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


def options(
    cfg: TuneConfig, shapes: Shapes, budget: int, architecture: PreTrainedConfig | None
) -> dict[str, dict[int, int]]:
    """The block sizes that each linear may have, with the bits of its constants.

    Args:
        architecture: the model's config.json, for quant.align=head alone.

    Raises:
        UserError: a linear has no size, or no choice meets the budget.
    """
    allowed = allowed_sizes(shapes, cfg.candidates, cfg.quant.align, architecture)
    return option_bits(shapes, allowed, cfg.quant.double, budget)


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


def problem_of(cfg: TuneConfig, profile: Profile, budget: int, architecture: PreTrainedConfig | None) -> Problem:
    """The choice that `cfg` asks for, with at most `budget` bits of constants."""
    return pose(options(cfg, profile.shapes, budget, architecture), profile.rises(cfg.sensitivity), budget)


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Full names of linears by their last part, such as q_proj."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return kinds
