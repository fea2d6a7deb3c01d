"""Compare decompositions of a matrix at low rank by error and time, and the starts of adapters over packed weights.

    python -m experiments.decompose_study
    python -m experiments.run +method=full output_dir=outputs/full
    python -m experiments.decompose_study tuned=outputs/full

Every decomposition of modules/adapters/decompose.py × rank on the weights W of a model, and on the changes ΔW that full
fine-tuning made of them if `tuned` names such a model. Then ‖W − Q − BA‖ / ‖W‖ where a packed base Q and an adapter
begin: nothing but Q (QLoRA's init=default), LoftQ and quantized PiSSA with one and with five iterations. Printed as
tables; written to output_dir: decompose.csv and starts.csv with a row a layer, and decompose.png.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from experiments.blocks.quant_types import quantize_dequantize
from experiments.config import TrainerConfig
from experiments.errors import UserError
from experiments.models.load import load_model, take_experts
from experiments.runs.base_and_tuned import load_pair, model_config
from experiments.system import machine
from experiments.system.cli import hydra_command
from experiments.system.directory import results_directory
from experiments.system.files import as_csv, write_atomically, write_figure
from experiments.system.palette import COLOURS, MARKERS
from experiments.system.progress import bar
from kernels.codebook import BLOCK_FORMATS, BLOCKSIZES, quant_types
from modules import NF4Linear, decoder_linears
from modules.adapters.decompose import METHODS, decompose
from modules.adapters.quantized_init import quantized_init
from modules.mixtures import take_over_experts

WEIGHTS, CHANGES = "W", "ΔW"
FILES = ("decompose.csv", "starts.csv", "decompose.png")
STARTS = {  # by their names as init=: the arguments of quantized_init
    "default": None,
    "loftq": ("loftq", 1),
    "loftq_iter_5": ("loftq", 5),
    "qpissa_iter_1": ("pissa", 1),
    "qpissa": ("pissa", 5),
}


@dataclass
class DecomposeConfig:
    base: str = ""  # a name in conf/model, a Hugging Face directory or a GGUF file
    tuned: str | None = None  # a run's directory or a Hugging Face directory of the same architecture
    ranks: list[int] = field(default_factory=list)  # to cut to
    every: int = 10  # every so many-th linear of the decoder is decomposed
    blocksize: int = 64  # of the packed base, with double quantization
    quant_type: str = "nf4"  # of the packed base: nf4 | fp4 | int4 | mxfp4 | nvfp4
    output_dir: str = ""  # where to write
    overwrite: bool = False  # replace the results of an earlier run in output_dir


ConfigStore.instance().store(name="decompose_study_schema", node=DecomposeConfig)


def check(cfg: DecomposeConfig) -> None:
    """Raise UserError for values that the schema's types cannot exclude."""
    if not cfg.ranks or min(cfg.ranks) < 1:
        raise UserError(f"ranks={cfg.ranks}: name one or more, each 1 or more")
    if cfg.every < 1:
        raise UserError(f"every={cfg.every}: choose 1 or more")
    if cfg.quant_type not in quant_types():
        raise UserError(f"quant_type={cfg.quant_type}: choose {', '.join(quant_types())}")
    if cfg.quant_type in BLOCK_FORMATS:
        fixed = BLOCK_FORMATS[cfg.quant_type].blocksize
        if cfg.blocksize != fixed:
            raise UserError(f"blocksize={cfg.blocksize}: {cfg.quant_type} has blocks of {fixed}: set blocksize={fixed}")
    elif cfg.blocksize not in BLOCKSIZES:
        raise UserError(f"blocksize={cfg.blocksize}: choose one of {', '.join(map(str, BLOCKSIZES))}")


def matrices(cfg: DecomposeConfig) -> dict[str, dict[str, Tensor]]:
    """W and, with `cfg.tuned`, ΔW of every `cfg.every`-th linear [out, in], fp32, by name; of experts each is one.

    Raises:
        UserError: a model that is not there or packed, or a rank that a linear cannot have.
    """
    if cfg.tuned is None:
        base, tuned = load_model(model_config(cfg.base), torch.float32, seed=0)[0], None
    else:
        base, tuned, _ = load_pair(cfg.base, cfg.tuned)
    take_experts(base)
    if any(isinstance(linear, NF4Linear) for linear in decoder_linears(base).values()):
        raise UserError(f"{cfg.base} is packed: choose a dense model")
    weights = dict(list(_weights(base).items())[:: cfg.every])
    smallest = min(weights, key=lambda name: min(weights[name].shape))
    if max(cfg.ranks) > min(weights[smallest].shape):
        raise UserError(f"ranks: {smallest} is {list(weights[smallest].shape)}, too small for rank {max(cfg.ranks)}")
    if tuned is None:
        return {WEIGHTS: weights}
    take_over_experts(tuned)
    after = _weights(tuned)
    changes = {name: after[name] - w for name, w in weights.items()}
    if not any(change.any() for change in changes.values()):
        raise UserError(f"{cfg.tuned} has the weights of {cfg.base}: nothing changed")
    return {WEIGHTS: weights, CHANGES: {name: change for name, change in changes.items() if change.any()}}


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the decoder's linears; those of experts under `<linear>.<expert>`."""
    found = {}
    for name, linear in decoder_linears(model).items():
        weight = linear.weight.detach()
        found |= {name: weight} if weight.dim() == 2 else {f"{name}.{e}": w for e, w in enumerate(weight)}
    return found


def _rows(tensors: dict[str, Tensor], title: str, measure: Callable[[Tensor], Iterable[dict]]) -> list[dict]:
    rows = []
    for name, w in bar(title)(list(tensors.items())):
        rows += [{"layer": name, "norm": w.norm().item(), **row} for row in measure(w)]
    return rows


def measure_decompositions(tensors: dict[str, Tensor], ranks: list[int]) -> list[dict]:
    """A row for each matrix, method and rank: error ‖W − BA‖ / ‖W‖ and seconds."""

    def measure(w: Tensor) -> Iterable[dict]:
        for method, rank in itertools.product(METHODS, ranks):
            start = time.perf_counter()
            lora_A, lora_B = decompose(w, rank, method)
            seconds = time.perf_counter() - start
            error = ((w - lora_B @ lora_A).norm() / w.norm()).item()
            yield {"method": method, "rank": rank, "error": error, "seconds": seconds}

    return _rows(tensors, "decomposing", measure)


def measure_starts(weights: dict[str, Tensor], cfg: DecomposeConfig) -> list[dict]:
    """A row for each weight, rank and start: ‖W − Q − BA‖ / ‖W‖."""

    def measure(w: Tensor) -> Iterable[dict]:
        plain = quantize_dequantize(w, cfg.quant_type, cfg.blocksize, True)
        for (init, how), rank in itertools.product(STARTS.items(), cfg.ranks):
            error = ((w - plain).norm() / w.norm()).item()
            if how is not None:
                error = quantized_init(w, rank, *how, cfg.blocksize, True, cfg.quant_type).errors[-1]
            yield {"init": init, "rank": rank, "error": error}

    return _rows(weights, "packing", measure)


def pooled(rows: list[dict], **chosen) -> tuple[float, float]:
    """Of all layers together, in the rows with these values: (error, mean seconds)."""
    rows = [row for row in rows if all(row[key] == value for key, value in chosen.items())]
    squares = sum(row["norm"] ** 2 for row in rows)
    error = (sum((row["error"] * row["norm"]) ** 2 for row in rows) / squares) ** 0.5
    return error, sum(row.get("seconds", 0.0) for row in rows) / len(rows)


def tables(cfg: DecomposeConfig, decomposed: dict[str, list[dict]], starts: list[dict]) -> str:
    """The tables for the terminal."""
    lines = []
    heads = "".join(f"{f'rank {rank}':>18}" for rank in cfg.ranks)
    for kind, rows in decomposed.items():
        title = f"{kind} of {len({row['layer'] for row in rows})} linears"
        lines += [f"{title:<24}{heads}    error ‖{kind} − BA‖ / ‖{kind}‖, ms a matrix"]
        for method in METHODS:
            cells = [pooled(rows, method=method, rank=rank) for rank in cfg.ranks]
            lines.append(f"{method:<24}" + "".join(f"{e:>9.2%}{1000 * s:>6.0f} ms" for e, s in cells))
        lines.append("")
    lines.append(f"{f'{cfg.quant_type}, block {cfg.blocksize}':<24}{heads}    error ‖W − Q − BA‖ / ‖W‖ at the start")
    for init in STARTS:
        errors = [pooled(starts, init=init, rank=rank)[0] for rank in cfg.ranks]
        lines.append(f"init={init:<19}" + "".join(f"{error:>18.2%}" for error in errors))
    return "\n".join(lines)


def plot(cfg: DecomposeConfig, decomposed: dict[str, list[dict]], starts: list[dict]) -> Figure:
    """Error against time, a panel for W and ΔW each, and the starts' error against the rank."""
    figure = Figure(figsize=(4.6 * (1 + len(decomposed)), 4.8), layout="constrained")
    *panels, last = figure.subplots(1, 1 + len(decomposed))
    for axes, (kind, rows) in zip(panels, decomposed.items()):
        for position, method in enumerate(METHODS):
            points = [pooled(rows, method=method, rank=rank) for rank in cfg.ranks]
            look = {"color": COLOURS[position], "marker": MARKERS[position], "label": method}
            axes.plot([1000 * s for _, s in points], [e for e, _ in points], **look)
        for rank in cfg.ranks:
            error, seconds = pooled(rows, method="svd", rank=rank)
            place = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": "small"}
            axes.annotate(f"rank {rank}", (1000 * seconds, error), **place)
        axes.set(title=kind, xlabel="ms a matrix", ylabel=f"error, ‖{kind} − BA‖ / ‖{kind}‖")
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
    for position, init in enumerate(STARTS):
        errors = [pooled(starts, init=init, rank=rank)[0] for rank in cfg.ranks]
        last.plot(cfg.ranks, errors, color=COLOURS[position], marker=MARKERS[position], label=f"init={init}")
    last.set_xscale("log", base=2)
    last.set_xticks(cfg.ranks, map(str, cfg.ranks))
    last.set(title=f"{cfg.quant_type}, block {cfg.blocksize}", xlabel="rank", ylabel="error, ‖W − Q − BA‖ / ‖W‖")
    for axes in (panels[0], last):
        axes.legend(frameon=False, fontsize="small")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure


@hydra_command("decompose_study", DecomposeConfig)
def main(cfg: DictConfig) -> None:
    config: DecomposeConfig = OmegaConf.to_object(cfg)
    check(config)
    machine.set_up_cpu(TrainerConfig())
    with results_directory(config, FILES):
        found = matrices(config)
        decomposed = {kind: measure_decompositions(tensors, config.ranks) for kind, tensors in found.items()}
        starts = measure_starts(found[WEIGHTS], config)
        print(tables(config, decomposed, starts))
        rows = [{"matrix": kind, **row} for kind, rows in decomposed.items() for row in rows]
        files = [Path(config.output_dir) / name for name in FILES]
        write_atomically(files[0], as_csv(list(rows[0]), rows))
        write_atomically(files[1], as_csv(list(starts[0]), starts))
        write_figure(files[2], plot(config, decomposed, starts), dpi=120)
    print("\nWritten:", *files, sep="\n  ")


if __name__ == "__main__":
    main()
