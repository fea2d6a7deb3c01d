"""A picture of the memory that a step needs, against rank, sequence length and model size. Each point is a plan."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib import ticker
from matplotlib.figure import Figure

from experiments.config import Config
from experiments.models.named import named_model
from experiments.plan.budget import Budget, budget
from experiments.plan.cards import CARDS
from experiments.plan.table import heading
from experiments.runs.identity import identity
from experiments.system.files import write_figure
from experiments.system.palette import BLUE, ORANGE
from experiments.system.progress import bar

RANKS = (4, 16, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SIZES = ("gemma-3-1b", "llama-7b", "llama-13b", "llama-33b", "llama-65b", "gpt3-175b")
LINES = ("rtx4090", "a6000", "h100", "h200")  # whose memory is drawn


def file_name(cfg: Config) -> str:
    return f"{cfg.model.name}-{cfg.method.name}.png"


def plot(cfg: Config, dtype: torch.dtype, batch: int, seq: int, needs: Budget) -> Path:
    """Draw and write the picture to cfg.output_dir; return where it is. `needs` is the budget of `cfg` itself."""
    panels: list[tuple[str, list, Callable[..., Budget]]] = []
    if "rank" in identity(cfg):
        ranks = sorted({r for r in (*RANKS, cfg.rank) if r <= needs.widest})
        panels.append(("rank", ranks, lambda rank: budget(replace(cfg, rank=rank), dtype, batch, seq)))
    lengths = sorted({n for n in (*LENGTHS, seq) if n <= min(needs.longest, cfg.trainer.tokens or n)})
    panels.append(("tokens of a sequence", lengths, lambda length: budget(cfg, dtype, batch, length)))
    panels.append(
        ("parameters", list(SIZES), lambda name: budget(replace(cfg, model=named_model(name)), dtype, batch, seq))
    )

    figure = Figure(figsize=(5.2 * len(panels), 4.6), layout="constrained")  # not pyplot, whose state a notebook shares
    figure.suptitle(heading(cfg, dtype), fontsize="medium")
    for axes, (label, values, plan) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        plans = [plan(value) for value in bar(f"planning by {label}")(values)]
        sized = label == "parameters"
        x = [one.parameters for one in plans] if sized else values
        for checkpointing, color, marker, name in ((False, BLUE, "o", "plain"), (True, ORANGE, "s", "checkpointing")):
            if not checkpointing or all(one.checkpoints for one in plans):
                y = [one.peak(checkpointing) / 1e9 for one in plans]
                axes.plot(x, y, color=color, marker=marker, label=name)
        if not sized:
            kept = [(one.peak(False) - one.step(False).activations) / 1e9 for one in plans]
            axes.plot(x, kept, color="#999999", linestyle=":", label="plain, without activations")
        low, high = axes.get_ylim()
        for card in (CARDS[name] for name in LINES):
            height = card.mib * 2**20 / 1e9
            if sized or low < height < high:
                axes.axhline(height, color="#999999", linewidth=0.8, zorder=0)
                axes.annotate(card.name, (0.01, height), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
        axes.set(xlabel=label, ylabel="GB on one GPU, peak of a step", xscale="log" if sized else "linear")
        if sized:
            axes.set_yscale("log")
            axes.margins(x=0.22)  # names stand to the right of their points
            axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
            for name, one in zip(values, plans):
                where = (one.parameters, one.peak(one.checkpoints) / 1e9)
                axes.annotate(name, where, textcoords="offset points", xytext=(8, -5), fontsize=7)
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    path = Path(cfg.output_dir) / file_name(cfg)
    write_figure(path, figure)
    return path
