"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in one directory.

Keys: base_model.model.<path>.lora_A.weight [rank, in], .lora_B.weight [out, rank] and, for DoRA,
.lora_magnitude_vector [out]. Written under a temporary name and renamed, so that no half file is ever left.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.adapter import adapted_linears, attach
from modules.linear import DoRALinear, NF4Linear

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters under PEFT's names."""
    state = {}
    for name, linear in adapted_linears(model).items():
        state[f"{PREFIX}{name}.lora_A.weight"] = linear.lora_A
        state[f"{PREFIX}{name}.lora_B.weight"] = linear.lora_B
        if isinstance(linear, DoRALinear):
            state[f"{PREFIX}{name}.lora_magnitude_vector"] = linear.magnitude
    return state


def _target_modules(model: nn.Module, adapted: list[str]) -> list[str]:
    """Suffixes that mean exactly the adapted linears; their full names where no suffixes do."""
    suffixes = sorted({name.rpartition(".")[2] for name in adapted})
    # PEFT matches suffixes against every linear, lm_head and those without an adapter included.
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | NF4Linear)}
    others = linears - {f"{name}.base" for name in adapted}
    return adapted if any(name.rpartition(".")[2] in suffixes for name in others) else suffixes


def save_adapter(model: nn.Module, directory: str | Path, base_model_name: str | None = None) -> None:
    """Write the adapters of `model` so that `peft.PeftModel.from_pretrained(base_model, directory)` reads them.

    Args:
        base_model_name: what the config names as the base model (PEFT's `base_model_name_or_path`).

    Raises:
        ValueError: the model has no adapter.
    """
    linears = adapted_linears(model)
    if not linears:
        raise ValueError("the model has no adapter to save")
    first = next(iter(linears.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": first.rank,
        "lora_alpha": first.lora_alpha,
        "lora_dropout": first.dropout,
        "target_modules": _target_modules(model, list(linears)),
        "use_dora": isinstance(first, DoRALinear),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: parameter.detach().contiguous() for name, parameter in adapter_state(model).items()}
    partial = directory / f".{WEIGHTS_FILE}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, directory / WEIGHTS_FILE)
    partial = directory / f".{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, directory / CONFIG_FILE)


def _read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no adapter: {name} is missing")
    try:
        return json.loads((directory / CONFIG_FILE).read_text()), load_file(directory / WEIGHTS_FILE)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{directory} holds no readable adapter: {error}") from error


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | Path) -> list[str]:
    """Attach to `model` the adapter that `save_adapter` or PEFT wrote to `directory`.

    Returns:
        The full names of the adapted linears.

    Raises:
        ValueError: no adapter there, an unreadable one, or one that does not fit the model.
    """
    config, tensors = _read(Path(directory))
    if config.get("peft_type") != "LORA" or config.get("use_rslora") or config.get("rank_pattern"):
        raise ValueError(f"{directory}: only plain LoRA and DoRA adapters of one rank can be loaded")
    adapter = "dora" if config.get("use_dora") else "lora"
    names = attach(model, adapter, config["r"], config["lora_alpha"], config["target_modules"], config["lora_dropout"])
    state = adapter_state(model)
    wrong = sorted(state.keys() ^ tensors.keys()) or [
        name for name in state if state[name].shape != tensors[name].shape
    ]
    if wrong:
        raise ValueError(f"{directory} is an adapter for another model; it differs in {', '.join(wrong[:3])}, …")
    for name, parameter in state.items():
        parameter.copy_(tensors[name])
    return names
