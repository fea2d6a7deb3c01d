"""Compare 4-bit data types and block sizes: error, held-out loss and bits a weight.

    python -m experiments.quant_study
    python -m experiments.quant_study quant_types=[nf4,fp4] blocksizes=[64] double=[true] loss=false

Every data type × block size × double quantization: the error on a model's linears and on random weights (Gaussian,
Laplace, heavy-tailed), and the held-out loss of the model with all linears of its decoder packed and unpacked.
Printed as a table; written to output_dir: study.csv with a row for every setting and every linear or kind of weights,
errors.png and loss.png.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from experiments.blocks.quant_types import (
    Errors,
    check_quant_type,
    code_bits,
    constant_bits_per_weight,
    quantize_dequantize,
    stored_bits,
)
from experiments.config import DataConfig, ModelConfig, TrainerConfig
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.load import load_model, take_experts
from experiments.system import machine
from experiments.system.cli import hydra_command
from experiments.system.directory import clear, results_directory
from experiments.system.files import as_csv, write_atomically, write_figure
from experiments.system.palette import COLOURS, MARKERS
from experiments.system.progress import bar
from experiments.training.evaluation import evaluate
from kernels.codebook import BLOCK_FORMATS, BLOCKSIZES, default_blocksize
from modules import NF4Linear, decoder_linears
from modules.mixtures import take_over_experts

FILES = ("study.csv", "errors.png", "loss.png")
COLUMNS = ("weights", "quant_type", "blocksize", "double", "bits", "rms_relative", "max_relative", "sqnr_db", "loss")
DEGREES_OF_FREEDOM = 3  # of Student's t: the fewest whole number with a variance
ON_A_GRID = (
    "The weights of {name} come from a GGUF file and lie on its grids already (SmolLM2's: Q4_1, sixteen evenly spaced "
    "values a block of 32).\nThat may flatter types with evenly spaced levels; the random weights lie on none."
)


@dataclass
class StudyConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)  # whose held-out part is measured on
    quant_types: list[str] = field(default_factory=list)  # nf4 | fp4 | int4 | mxfp4 | nvfp4 | nf2 … nf8
    # weights that share an absmax, and absmax in 8 bits; mxfp4 and nvfp4 have one block size and scales of 8 bits
    blocksizes: list[int] = field(default_factory=list)
    double: list[bool] = field(default_factory=list)
    every: int = 10  # errors are measured on every so many-th linear of the decoder
    values: int = 1_048_576  # random weights of each kind
    loss: bool = True  # measure the held-out loss, of the whole decoder in every setting
    batch_size: int = 16  # samples at once
    seed: int = 0  # of the random weights
    output_dir: str = ""  # where to write
    overwrite: bool = False  # replace the results of an earlier run in output_dir


ConfigStore.instance().store(name="quant_study_schema", node=StudyConfig)


@dataclass(frozen=True)
class Setting:
    quant_type: str
    blocksize: int
    double: bool


def check(cfg: StudyConfig) -> None:
    """Raise UserError for values that the schema's types cannot exclude."""
    for name in ("quant_types", "blocksizes", "double"):
        if not getattr(cfg, name):
            raise UserError(f"{name}=[] leaves nothing to compare")
    for quant_type in cfg.quant_types:
        try:
            check_quant_type(quant_type)
        except ValueError as error:
            raise UserError(f"quant_types: {error}") from error
    for blocksize in cfg.blocksizes:
        if blocksize not in BLOCKSIZES:
            raise UserError(f"blocksizes: {blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")
    for name in ("every", "values", "batch_size"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)}: choose 1 or more")


def settings(cfg: StudyConfig) -> list[Setting]:
    """Every data type with every block size, with and without double quantization; a block format as it is."""
    found = []
    for quant_type in cfg.quant_types:
        if quant_type in BLOCK_FORMATS:
            found.append(Setting(quant_type, default_blocksize(quant_type), True))
        else:
            found += [Setting(quant_type, *how) for how in itertools.product(cfg.blocksizes, cfg.double)]
    return found


def random_weights(n: int, seed: int) -> dict[str, Tensor]:
    """n weights of each kind, fp32; their scale does not matter."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2 + DEGREES_OF_FREEDOM, n, generator=generator)
    laplace = torch.empty(n).exponential_(generator=generator) * normal[1].sign()
    chi_squared = normal[2:].square().sum(dim=0)
    return {
        "Gaussian": normal[0],
        "Laplace": laplace,
        f"Student's t (ν={DEGREES_OF_FREEDOM})": normal[1] * (DEGREES_OF_FREEDOM / chi_squared).sqrt(),
    }


def rows_of(name: str, tensors: dict[str, Tensor], setting: Setting) -> Iterator[dict]:
    """A row for each of `tensors`, and one for all of them together under `name`, if that is none of theirs."""
    total, total_bits = Errors(), 0
    for label, w in tensors.items():
        errors, bits = Errors(), stored_bits(w.numel(), **vars(setting))
        quantized = quantize_dequantize(w, **vars(setting))
        errors.add(w, quantized)
        total.add(w, quantized)
        total_bits += bits
        yield _row(label, setting, bits, errors)
    if name not in tensors:
        yield _row(name, setting, total_bits, total)


def _row(weights: str, setting: Setting, bits: int, errors: Errors) -> dict:
    measured = {name: getattr(errors, name) for name in ("rms_relative", "max_relative", "sqnr_db")}
    return {"weights": weights, **vars(setting), "bits": bits / errors.n, **measured}


class HeldoutLoss:
    """The held-out loss of a model, in nats a token, with the linears of its decoder packed and unpacked."""

    def __init__(self, cfg: StudyConfig, model: PreTrainedModel, where: tuple, examples: list, pad_id: int):
        self.examples, self.batch_size, self.pad_id = examples, cfg.batch_size, pad_id
        self.exact = {name: linear.weight.detach() for name, linear in decoder_linears(model).items()}
        self.model = type(model)(model.config)
        self.model.load_state_dict(model.state_dict())
        take_over_experts(self.model)
        self.model.to(*where).eval()
        self.weights = {name: linear.weight for name, linear in decoder_linears(self.model).items()}

    def dense(self) -> float:
        return evaluate(self.model, self.examples, self.batch_size, self.pad_id).loss

    @torch.no_grad()
    def of(self, setting: Setting) -> float:
        for name, weight in self.weights.items():
            weight.copy_(quantize_dequantize(self.exact[name], **vars(setting)))
        return evaluate(self.model, self.examples, self.batch_size, self.pad_id).loss


@dataclass(frozen=True)
class Study:
    """The measurements.

    Attributes:
        model: name of the model, whose linears together are the rows with these `weights`.
        rows: of COLUMNS; `loss` is in those of the model alone.
        dense_loss: of the model as it is; None if no loss was measured.
    """

    model: str
    rows: list[dict]
    dense_loss: float | None


def study(cfg: StudyConfig) -> Study:
    """Measure every setting of `cfg`.

    Raises:
        UserError: the configuration or a file that it names is wrong; the message says how to repair it.
    """
    device, dtype = machine.set_up(TrainerConfig())
    model, tokenizer = load_model(cfg.model, torch.float32, cfg.seed)
    take_experts(model)
    linears = decoder_linears(model)
    if any(isinstance(linear, NF4Linear) for linear in linears.values()):
        raise UserError(f"model={cfg.model.name} is packed already: choose a dense one")
    heldout = load_data(cfg.data, tokenizer).heldout if cfg.loss else []
    layers = {name: linear.weight.detach() for name, linear in list(linears.items())[:: cfg.every]}
    loss = HeldoutLoss(cfg, model, (device, dtype), heldout, tokenizer.pad_token_id) if cfg.loss else None
    dense_loss = loss.dense() if loss else None
    name, rows = f"{cfg.model.name}'s linears", []
    random = random_weights(cfg.values, cfg.seed)
    for setting in bar("quantizing")(settings(cfg)):
        rows += rows_of(name, layers, setting)
        if loss:
            rows[-1]["loss"] = loss.of(setting)
        for label, w in random.items():
            rows += rows_of(label, {label: w}, setting)
    return Study(name, rows, dense_loss)


def table(found: Study) -> str:
    """Every setting in a line: bits a weight, the errors' root mean squares, the loss."""
    by_setting: dict[tuple, dict[str, dict]] = {}
    for row in found.rows:
        by_setting.setdefault((row["quant_type"], row["blocksize"], row["double"]), {})[row["weights"]] = row
    kinds = [found.model, *random_weights(1, 0)]
    lines = [f"{'':<6}{'block':>6}{'absmax':>8}{'bits':>7}  " + "".join(f"{kind:>18}" for kind in kinds)]
    lines[0] += f"{'held-out loss':>15}" if found.dense_loss is not None else ""
    for (quant_type, blocksize, double), rows in by_setting.items():
        bits = rows[found.model]["bits"]
        line = f"{quant_type:<6}{blocksize:>6}{'8 bits' if double else 'fp32':>8}{bits:>7.3f}  "
        line += "".join(f"{rows[kind]['rms_relative']:>18.2%}" for kind in kinds)
        line += f"{rows[found.model]['loss']:>15.4f}" if found.dense_loss is not None else ""
        lines.append(line)
    if found.dense_loss is not None:
        lines.append(f"{'dense':<27}  {'':>{18 * len(kinds)}}{found.dense_loss:>15.4f}")
    lines += ["", "Errors are ‖w' − w‖ / ‖w‖."]
    if sizes := sorted({row["blocksize"] for row in found.rows if row["quant_type"] not in BLOCK_FORMATS}):
        lines[-1] += " Constants, bits a weight, with absmax in fp32 and in 8 bits:"
        costs = (
            f"{b}: {constant_bits_per_weight(b, False):.3f}, {constant_bits_per_weight(b, True):.3f}" for b in sizes
        )
        lines.append("block " + "; ".join(costs))
    return "\n".join(lines)


def _curves(axes, rows: list[dict], measure: str, zoom: bool) -> None:
    """`measure` against bits a weight, a colour a data type; `zoom`: of four bits only, against their constants."""
    types = list(dict.fromkeys(row["quant_type"] for row in rows))
    for double in (True, False):
        for position, quant_type in enumerate(types):
            points = [row for row in rows if row["quant_type"] == quant_type and row["double"] == double]
            if not points or (zoom and code_bits(quant_type) != 4):
                continue
            points.sort(key=lambda row: row["bits"])
            colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
            look = {"mfc": colour, "lw": 1.4} if double else {"mfc": "white", "lw": 0.8, "ls": "--"}
            label = f"{quant_type}, absmax in {'8 bits' if double else 'fp32'}"
            x = [row["bits"] - 4 * zoom for row in points]
            axes.plot(x, [row[measure] for row in points], color=colour, marker=marker, ms=5, label=label, **look)
    axes.set(xlabel="bits a weight", yscale="log")
    if zoom:
        axes.set(xlabel="types of 4 bits: bits a weight for constants", xscale="log")
    axes.grid(alpha=0.3, which="both")


def plot_errors(found: Study) -> Figure:
    """A column for the model and one for each kind of random weights."""
    kinds = [found.model, *random_weights(1, 0)]
    figure = Figure(figsize=(4.1 * len(kinds), 9), layout="constrained")
    for zoom, panels in zip((False, True), figure.subplots(2, len(kinds), sharey="row")):
        for axes, kind in zip(panels, kinds):
            _curves(axes, [row for row in found.rows if row["weights"] == kind], "rms_relative", zoom)
            axes.set_title(kind, fontsize="medium")
        panels[0].set_ylabel("error, ‖w' − w‖ / ‖w‖")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6)
    return figure


def plot_loss(found: Study) -> Figure:
    """The held-out loss of every setting, beside the dense model's."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    rows = [row for row in found.rows if "loss" in row]
    for zoom, axes in zip((False, True), figure.subplots(1, 2)):
        _curves(axes, rows, "loss", zoom)
        axes.axhline(found.dense_loss, color="0.4", ls=":", lw=1.4, label="dense")
    figure.axes[0].set_ylabel("held-out loss (nats a token)")
    figure.axes[1].set_yscale("linear")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    return figure


@hydra_command("quant_study", StudyConfig)
def main(cfg: DictConfig) -> None:
    config: StudyConfig = OmegaConf.to_object(cfg)
    check(config)
    with results_directory(config, FILES):
        found, directory = study(config), Path(config.output_dir)
        print(table(found))
        if config.model.source in ("wheel", "gguf"):
            print(f"\n{ON_A_GRID.format(name=config.model.name)}")
        clear(directory, FILES)
        write_atomically(directory / "study.csv", as_csv(COLUMNS, found.rows))
        pictures = {"errors.png": plot_errors(found)} | ({"loss.png": plot_loss(found)} if config.loss else {})
        for name, figure in pictures.items():
            write_figure(directory / name, figure, dpi=120)
    print("\nWritten:", *(directory / name for name in ("study.csv", *pictures)), sep="\n  ")


if __name__ == "__main__":
    main()
