"""What a run leaves in its directory: config.yaml, metrics.jsonl, result.json, spectrum.csv, loss.png, samples.md."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from experiments.config import ADAPTER_KEYS, Config, flat
from experiments.errors import UserError
from experiments.runs.directory import write_config
from experiments.runs.spectrum import as_csv
from experiments.system.files import METRICS, RESULT, SPECTRUM, write_atomically
from experiments.training.evaluation import Evaluation
from modules import NF4Linear, adapters, decoder_linears
from modules.adapters.config import SETTINGS
from modules.linear import weight_shape

VERSION = 1  # of the numbers in result.json: raise it when earlier ones can no longer be compared with new ones
BLUE, ORANGE = "#0072b2", "#d55e00"  # of Okabe and Ito's palette, distinct to colour-blind readers


class RunDirectory:
    """The files of one run. Each is whole at any moment; metrics.jsonl grows by a line at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / METRICS
        self.records: list[dict] = []

    def begin(self, cfg: Config) -> None:
        """Start anew: write config.yaml, forget the metrics of an earlier run here."""
        write_config(cfg, self.path)
        self.metrics.unlink(missing_ok=True)

    def rewind(self, cfg: Config, step: int) -> None:
        """Go on after `step`: keep what metrics.jsonl has up to there. What a killed run logged later comes again."""
        write_config(cfg, self.path)
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                self.records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):  # the last one may be half written
                    raise UserError(f"{self.metrics}:{number}: not JSON: {error.msg}") from error
        self.records = [record for record in self.records if record["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in self.records))

    def log(self, record: dict) -> None:
        self.records.append(record)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_result(self, result: dict) -> None:
        write_atomically(self.path / RESULT, json.dumps(result, indent=2) + "\n")

    def write_spectra(self, rows: list[dict]) -> None:
        """Write spectrum.csv, a line an adapted linear (experiments/runs/spectrum.py); nothing without an adapter."""
        if rows:
            write_atomically(self.path / SPECTRUM, as_csv(rows))

    def write_samples(self, title: str, samples: list[dict[str, str]]) -> None:
        """Write samples.md: of each sample its prompt, reference, and the model's text before and after."""
        parts = [
            f"# {title}\n" if samples else f"# {title}\n\nNo samples: the data has no prompts, or trainer.samples=0."
        ]
        for number, sample in enumerate(samples, start=1):
            parts.append(f"## {number}\n\n```\n{sample['prompt'].strip()}\n```\n")
            for name in ("reference", "before", "after"):
                parts.append(f"**{name}**: {' '.join(sample[name].split()) or '(nothing)'}\n")
        write_atomically(self.path / "samples.md", "\n".join(parts))

    def plot_loss(self, title: str) -> None:
        """Draw loss.png from the records so far: training loss a step, held-out loss where it was measured."""
        from matplotlib.figure import Figure  # here: it takes memory that training could use

        figure = Figure(figsize=(7, 4.2), layout="constrained")  # not pyplot, whose state a notebook shares
        axes = figure.subplots()
        for key, style in (
            ("loss", {"color": BLUE, "lw": 1.2, "label": "training batch"}),
            ("heldout_loss", {"color": ORANGE, "marker": "o", "lw": 1.8, "label": "held out"}),
        ):
            points = [(record["step"], record[key]) for record in self.records if key in record]
            axes.plot(*zip(*points), **style)
        axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        partial = self.path / ".loss.png.partial"
        figure.savefig(partial, dpi=130, format="png")
        partial.replace(self.path / "loss.png")


def identity(cfg: Config) -> dict[str, Any]:
    """The values that decide what a run computes, by their full keys: of a method without rank no rank, of a dense
    base no blocksize."""
    used = SETTINGS.get(cfg.method.adapter, ())
    about_adapters = ("rank", "lora_alpha", "dropout", "target_modules", *ADAPTER_KEYS)
    unused = tuple(key for key in about_adapters if key not in used)
    if cfg.quant.name == "none":
        unused += ("quant.type", "quant.blocksize", "quant.double")
    return {key: value for key, value in flat(cfg).items() if key not in unused}


def title(cfg: Config) -> str:
    """The method, what sizes it, and the model: "lora, rank 16, smollm2"."""
    sizes = [key for key in ("rank", "prefix_tokens", "infix_tokens") if key in SETTINGS.get(cfg.method.adapter, ())]
    named = [f"{key.replace('_', ' ')} {getattr(cfg, key)}" for key in sizes if getattr(cfg, key)]
    return ", ".join([cfg.method.name, *named, cfg.model.name])


def config_hash(cfg: Config) -> str:
    """Twelve hex digits that runs of one configuration and one VERSION share, wherever they write and whatever tracks
    them. A key that has the schema's default does not count, so a key that is added later changes no hash."""
    defaults = flat(Config())
    told = {key: value for key, value in identity(cfg).items() if key not in defaults or value != defaults[key]}
    return hashlib.sha256(json.dumps([VERSION, told], sort_keys=True).encode()).hexdigest()[:12]


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def storage(model: nn.Module) -> dict[str, float | int]:
    """What the model occupies: parameters, bytes of base and adapter, bits a weight of the decoder's linears."""
    parameters = dict(model.named_parameters())  # a tied weight counts once
    names = _adapter_names(parameters) if adapters(model) else set()
    base = [p for name, p in parameters.items() if name not in names]
    adapter = [p for name, p in parameters.items() if name in names]
    linears = decoder_linears(model).values()
    packed = [linear for linear in linears if isinstance(linear, NF4Linear)]
    constants_and_codes = sum(_bytes(linear.buffers()) for linear in packed)
    dense = _bytes(linear.weight for linear in linears if linear not in packed)
    return {
        "trainable_params": sum(p.numel() for p in parameters.values() if p.requires_grad),
        "total_params": sum(p.numel() for p in parameters.values()) + _weights(packed),
        "bits_per_weight": 8 * (constants_and_codes + dense) / _weights(linears),
        "base_bytes": _bytes(base) + constants_and_codes,
        "adapter_bytes": _bytes(adapter),
    }


def _weights(linears) -> int:
    return sum(math.prod(weight_shape(linear)) for linear in linears)


def _adapter_names(parameters: dict[str, nn.Parameter]) -> set[str]:
    """Those of a model with adapters that are not the base's: what trains, and an A that is frozen."""
    return {name for name, p in parameters.items() if p.requires_grad or name.endswith(".lora_A")}


def compare(before: Evaluation, after: Evaluation) -> dict[str, float]:
    return {
        f"{name}_{when}": getattr(evaluation, name)
        for name in ("loss", "perplexity", "token_accuracy")
        for when, evaluation in (("before", before), ("after", after))
    }


def before_and_after(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What experiments/runs/measures.py measured, as result.json names it."""
    return {
        f"{name}_{when}": found[name]
        for name in after
        for when, found in (("before", before), ("after", after))
        if name in found
    }


def table(result: dict) -> str:
    """The result as the terminal shows it at the end of a run."""
    names = [key.removesuffix("_after") for key in result if key.endswith("_after")]
    width = max(18, *map(len, names))
    lines = [f"{'held out':<{width}}{'before':>10}{'after':>10}"]
    for name in names:
        form = "10.3f" if name.endswith("loss") else "10.2f" if name == "perplexity" else "10.1%"
        before, after = (f"{result[f'{name}_{when}']:>{form}}" for when in ("before", "after"))
        lines.append(f"{name.replace('_', ' '):<{width}}{before}{after}")
    lines += [
        "",
        f"trained {result['trainable_params']:,} of {result['total_params']:,} parameters; "
        f"base {result['base_bytes'] / 1e6:.1f} MB, {result['bits_per_weight']:.3f} bits a weight in its linears",
        f"{result['train_seconds']:.0f} s of training at {result['tokens_per_s']:,.0f} tokens/s, "
        f"{result['total_seconds']:.0f} s in all, peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB",
    ]
    return "\n".join(lines)
