"""Read and write PEFT's adapter_config.json. A setting that is not supported here is refused by name."""

import re

from torch import nn

from modules.adapters.config import ALL_LINEAR, AdapterConfig
from modules.adapters.targets import adapted_linears, all_linears, decoder_linears, find_saved, matches
from modules.experts import is_experts
from modules.files.peft_experts import experts_in_file
from modules.linear import NF4Linear, is_conv1d

# Keys that do not change the adapter's output, and keys that read_config reads.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "runtime_config", "megatron_core", "qalora_group_size", "fan_in_fan_out"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
    *("bias", "use_dora", "use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern"),
    "target_parameters",
    *("init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
}
# Initialisations that change the base. PEFT applies them again when it loads the file.
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def read_config(raw: dict) -> AdapterConfig:
    """The settings in `raw`, the content of an adapter_config.json.

    Raises:
        ValueError: a setting is not supported, or its value is out of range.
    """
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {raw.get('peft_type')!r} is not supported, only LORA and PROMPT_TUNING are")
    if unknown := [f"{key}={value!r}" for key, value in raw.items() if key not in _HARMLESS and value]:
        raise ValueError(f"{unknown[0]} is not supported")
    init = raw.get("init_lora_weights")
    init = init if isinstance(init, str) and init.startswith(_CHANGE_THE_BASE) else "default"
    if init not in ("pissa", "olora", "default"):  # pissa_niter_N begins with random numbers
        raise ValueError(
            f"init_lora_weights={init!r} is not supported: it changes the base model, and the file does not say how"
        )
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if key not in raw]:
        raise ValueError(f"{missing[0]} is missing")
    return AdapterConfig(
        adapter="dora" if raw.get("use_dora") else "lora",
        rank=raw["r"],
        lora_alpha=raw["lora_alpha"],
        target_modules=raw["target_modules"] or ([] if raw.get("target_parameters") else None),
        dropout=raw.get("lora_dropout", 0.0),
        exclude_modules=raw.get("exclude_modules"),
        rank_pattern=raw.get("rank_pattern"),
        alpha_pattern=raw.get("alpha_pattern"),
        modules_to_save=raw.get("modules_to_save"),
        bias=raw.get("bias", "none"),
        rslora=raw.get("use_rslora", False),
        init=init,
    )


def targets_in_file(model: nn.Module, raw: dict, config: AdapterConfig) -> list[str]:
    """The full names of the linears of `model` that PEFT would adapt for `raw`; unlike `find_targets`, maybe none.

    Raises:
        ValueError: PEFT would change the base in a way that is not supported here.
    """
    linears = decoder_linears(model) if config.target_modules == ALL_LINEAR else all_linears(model)
    names = [
        name
        for name, linear in linears.items()
        if not is_experts(linear)
        and (config.target_modules == ALL_LINEAR or matches(config.target_modules, name))
        and not (config.exclude_modules and matches(config.exclude_modules, name))
        and not any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.modules_to_save)
    ]
    for name in names if config.init != "default" else []:
        if isinstance(linears[name], NF4Linear) or (config.init == "olora" and is_conv1d(linears[name])):
            kind = type(linears[name]).__name__
            raise ValueError(f"init_lora_weights={config.init!r} is not supported over {kind}: {name} is one")
    experts = experts_in_file(raw, linears)
    layers = raw.get("layers_to_transform")
    if layers is None or layers == []:
        return names + experts
    layers = [layers] if isinstance(layers, int) else layers
    pattern = raw.get("layers_pattern") or r"[^.]*"
    pattern = pattern if isinstance(pattern, str) else "|".join(pattern)
    numbers = {name: re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name) for name in names}
    full = {name for name in names if not isinstance(config.target_modules, str) and name in config.target_modules}
    chosen = [name for name in names if name in full or (numbers[name] and int(numbers[name][1]) in layers)]
    return chosen + experts


def write_config(model: nn.Module, config: AdapterConfig, adapted: list[str], base_model_name: str | None) -> dict:
    """The content of adapter_config.json for the adapter of `config` on the linears `adapted` of `model`.

    PiSSA and OLoRA become a plain LoRA of twice the rank with the same scaling.
    """
    ranks = 2 if config.init.startswith(("pissa", "olora")) else 1
    alphas = ranks**0.5 if config.rslora else ranks
    linears = all_linears(model)
    experts = [name for name in adapted if is_experts(linears[name])]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": base_model_name,
        "r": ranks * config.rank,
        "lora_alpha": _number(alphas * config.lora_alpha),
        "lora_dropout": 0.0 if experts else config.dropout,  # PEFT refuses dropout on experts
        "target_modules": _target_modules(model, [name for name in adapted if name not in experts]),
        "target_parameters": experts or None,
        "rank_pattern": {key: ranks * rank for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: _number(alphas * alpha) for key, alpha in config.alpha_pattern.items()},
        "modules_to_save": find_saved(model, config.modules_to_save) or None,
        "use_dora": config.adapter == "dora",
        "use_rslora": config.rslora,
        "bias": config.bias,
        "fan_in_fan_out": any(is_conv1d(linears[name]) for name in adapted),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _target_modules(model: nn.Module, adapted: list[str]) -> list[str] | str:
    """A `target_modules` by which PEFT matches exactly `adapted`: suffixes, full names or a regular expression."""
    bases = {f"{name}.base" for name in adapted_linears(model)}
    if not adapted:
        return []
    modules = [
        name
        for name, module in model.named_modules()
        if name not in bases and not is_experts(getattr(module, "base", module))
    ]
    for suffixes in (sorted({name.rpartition(".")[2] for name in adapted}), adapted):
        if {name for name in modules if matches(suffixes, name)} == set(adapted):
            return suffixes
    return "|".join(re.escape(name) for name in adapted)
