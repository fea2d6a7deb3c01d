"""Turn a fully fine-tuned model into a LoRA or DoRA adapter, and report the loss of doing so.

    python -m experiments.run +method=full output_dir=outputs/full
    python -m experiments.extract base=smollm2 tuned=outputs/full rank=16
    python -m experiments.extract base=DIR tuned=DIR rank=16 adapter=dora

Each target linear's change W′ − W is cut to rank r (modules/adapters/nearest.py). Changes elsewhere, in norms,
embeddings or other linears, cannot be in such an adapter: they are listed. Written to output_dir: adapter/ in PEFT's
format, and extract.json with every layer's error and the held-out loss of base, tuned and extracted model.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from experiments.config import DataConfig, TrainerConfig
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.load import take_experts
from experiments.runs.base_and_tuned import load_pair, model_config
from experiments.runs.model_files import ADAPTER
from experiments.system import machine
from experiments.system.cli import hydra_command
from experiments.system.directory import results_directory
from experiments.system.files import directory_atomically, write_atomically
from experiments.system.progress import bar
from experiments.training.evaluation import Evaluation, evaluate
from modules import DoRALinear, LoRALinear, adapted_linears, attach, decoder_linears, save_adapter
from modules.adapters.decompose import METHODS
from modules.adapters.nearest import nearest_dora, nearest_lora
from modules.linear import dense_weight
from modules.mixtures import take_over_experts


@dataclass
class ExtractConfig:
    base: str = MISSING  # a name in conf/model, a Hugging Face directory or a GGUF file
    tuned: str = MISSING  # a run's directory or a Hugging Face directory of the same architecture
    adapter: str = MISSING  # lora | dora
    rank: int = MISSING  # of every adapter
    lora_alpha: float | None = None  # rank, so that BA itself is the change
    target_modules: Any = "all-linear"  # as in a run
    decomposition: str = MISSING  # svd | randomized | als | nuclear: modules/adapters/decompose.py
    data: DataConfig = field(default_factory=DataConfig)  # whose held-out part is measured on
    batch_size: int = 16  # samples at once
    output_dir: str = MISSING  # where to write
    overwrite: bool = False  # replace the results of an earlier run in output_dir


ConfigStore.instance().store(name="extract_schema", node=ExtractConfig)
REPORT = "extract.json"


@torch.no_grad()
def set_extracted(layer: LoRALinear, tuned: Tensor, method: str) -> float:
    """Set a new adapter of `layer` to the values that bring it nearest to the weight `tuned` [out, in]; each expert by
    itself, if these are [experts, out, in].

    Returns:
        The missing share of the change, ‖W′ − W″‖ / ‖W′ − W‖; 0 where nothing changed.
    """
    w = dense_weight(layer.base).float()
    nearest = nearest_dora if isinstance(layer, DoRALinear) else nearest_lora
    experts = [nearest(*of, layer.rank, method) for of in zip(w.view(-1, *w.shape[-2:]), tuned.view(-1, *w.shape[-2:]))]
    lora_A, lora_B, *magnitude = (torch.stack(values) for values in zip(*experts))
    layer.lora_A.copy_((lora_A / layer.scaling**0.5).view_as(layer.lora_A))
    layer.lora_B.copy_((lora_B / layer.scaling**0.5).view_as(layer.lora_B))
    if magnitude:
        layer.magnitude.copy_(magnitude[0].view_as(layer.magnitude))
    change = (tuned - w).norm()
    return ((tuned - layer.merged_weight()).norm() / change).item() if change else 0.0


def extract(cfg: ExtractConfig) -> dict:
    """Do as `cfg` says, write everything to `cfg.output_dir`, return the content of extract.json.

    Raises:
        UserError: the configuration or a file that it names is wrong; the message says how to repair it.
    """
    if cfg.adapter not in ("lora", "dora"):
        raise UserError(f"adapter={cfg.adapter}: choose lora or dora")
    if cfg.decomposition not in METHODS:
        raise UserError(f"decomposition={cfg.decomposition}: choose {', '.join(METHODS)}")
    if cfg.batch_size < 1:
        raise UserError(f"batch_size={cfg.batch_size}: choose 1 or more")
    base, tuned, tokenizer = load_pair(cfg.base, cfg.tuned)
    take_experts(base)
    take_over_experts(tuned)
    heldout = load_data(cfg.data, tokenizer).heldout
    device = machine.pick_device(TrainerConfig())
    changed = dict(tuned.named_parameters())
    weights = {name: linear.weight.detach() for name, linear in decoder_linears(tuned).items()}
    lora_alpha = cfg.rank if cfg.lora_alpha is None else cfg.lora_alpha
    before = {name: p.detach() for name, p in base.named_parameters()}
    try:
        names = attach(base, cfg.adapter, cfg.rank, lora_alpha, cfg.target_modules)
    except ValueError as error:
        raise UserError(str(error)) from error
    directory = Path(cfg.output_dir)

    def measure(model: PreTrainedModel, title: str) -> Evaluation:
        return evaluate(model.to(device), heldout, cfg.batch_size, tokenizer.pad_token_id, bar(title))

    evaluations = {"base": None, "tuned": measure(tuned, "evaluating the tuned model")}
    # B starts at zero and m at ‖W‖: the model with its new adapter still is the base.
    evaluations["base"] = measure(base, "evaluating the base")
    layers, lost, total = {}, 0.0, 0.0
    for name, layer in bar("extracting")(list(adapted_linears(base).items())):
        weight = weights[name].to(device)
        layers[name] = set_extracted(layer, weight, cfg.decomposition)
        change = (weight - dense_weight(layer.base).float()).square().sum().item()
        lost, total = lost + layers[name] ** 2 * change, total + change
    evaluations["extracted"] = measure(base, "evaluating the adapter")

    adapted = {f"{name}.weight" for name in names}
    elsewhere = {
        name: ((changed[name].cpu() - old.cpu()).norm() / old.cpu().norm().clamp(min=1e-30)).item()
        for name, old in before.items()
        if name not in adapted and not torch.equal(changed[name].cpu(), old.cpu())
    }
    result = {
        **{key: getattr(cfg, key) for key in ("base", "tuned", "adapter", "rank", "decomposition")},
        "lora_alpha": lora_alpha,
        "kept_share": 1 - lost / total if total else 1.0,
        "evaluations": {name: asdict(e) | {"perplexity": e.perplexity} for name, e in evaluations.items()},
        "layer_errors": layers,
        "changed_elsewhere": elsewhere,
    }
    with directory_atomically(directory / ADAPTER) as folder:
        save_adapter(base, folder, model_config(cfg.base).path or cfg.base)
    write_atomically(directory / REPORT, json.dumps(result, indent=2) + "\n")
    return result


def table(result: dict) -> str:
    """The result as the terminal shows it."""
    rows = [f"{'held out':<22}{'loss':>8}{'perplexity':>12}{'token accuracy':>16}"]
    titles = {"extracted": f"{result['adapter']}, rank {result['rank']}"}
    for name in ("base", "tuned", "extracted"):
        e = result["evaluations"][name]
        rows.append(
            f"{titles.get(name, name):<22}{e['loss']:>8.3f}{e['perplexity']:>12.2f}{e['token_accuracy']:>16.1%}"
        )
    errors = result["layer_errors"]
    worst = max(errors, key=errors.get)
    rows += [
        "",
        f"{result['kept_share']:.1%} of ‖W′ − W‖² kept in {len(errors)} linears; least in {worst}, "
        f"{1 - errors[worst] ** 2:.1%}",
    ]
    if elsewhere := result["changed_elsewhere"]:
        most = max(elsewhere, key=elsewhere.get)
        largest = f"the largest in {most}, {elsewhere[most]:.2%} of it"
        rows.append(f"not in the adapter: changes of {len(elsewhere)} other tensors, {largest}")
    return "\n".join(rows)


@hydra_command("extract", ExtractConfig)
def main(cfg: DictConfig) -> None:
    for key in ("base", "tuned"):
        if OmegaConf.is_missing(cfg, key):
            raise UserError(f"no {key}: add {key}=DIR")
    config: ExtractConfig = OmegaConf.to_object(cfg)
    with results_directory(config, (ADAPTER, REPORT)):
        result = extract(config)
    print(f"{table(result)}\n\nWritten:", config.output_dir, sep="\n  ")


if __name__ == "__main__":
    main()
