"""Find the linears and blocks of a model, and select the linears that get an adapter."""

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from modules.adapters.bottleneck import BottleneckLinear
from modules.adapters.config import ALL_LINEAR, SETTINGS, AdapterConfig, compile_patterns, matching_key
from modules.adapters.model_code import left_out
from modules.experts import ExpertsLinear, is_experts
from modules.linear import LoRALinear, NF4Linear, is_conv1d, weight_shape


def all_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear, Conv1D and NF4Linear of `model`, by its full name, but for those that model_code.py leaves out.

    The linears of all experts of a layer are one of them once `take_over_experts` has made modules of them. An adapted
    layer counts as its base.
    """
    wrapped = wrapped_linears(model)
    inner = {f"{name}.base" for name in wrapped} | left_out(model).keys()
    found = {}
    for name, module in model.named_modules():
        if name in wrapped:
            found[name] = module.base
        elif name not in inner and (isinstance(module, nn.Linear | NF4Linear | ExpertsLinear) or is_conv1d(module)):
            found[name] = module
    return found


def decoder_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of `model` except the output embeddings (lm_head), by its full name."""
    head = output_embeddings(model)
    return {name: linear for name, linear in all_linears(model).items() if linear is not head}


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The linear that computes the logits, or its base if it is adapted. None if the model does not say which it is."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head.base if isinstance(head, LoRALinear | BottleneckLinear) else head


def adapted_linears(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA and DoRA layers in the tree of `model`, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def wrapped_linears(model: nn.Module) -> dict[str, LoRALinear | BottleneckLinear]:
    """The LoRA, DoRA and bottleneck layers in the tree of `model`, by full name. Each holds a linear as its base."""
    return {n: module for n, module in model.named_modules() if isinstance(module, LoRALinear | BottleneckLinear)}


def decoder_blocks(model: nn.Module) -> tuple[str, list[str]]:
    """The full name of the module that holds the decoder's blocks, and the full names of the blocks, in order.

    Raises:
        ValueError: `model` is not a transformers decoder, or it has no list of `num_hidden_layers` blocks.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else None
    layers = getattr(config, "num_hidden_layers", None)
    inside = set(model.get_decoder().modules()) if hasattr(model, "get_decoder") else set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module in inside and len(module) == layers:
            return name.rpartition(".")[0], [f"{name}.{number}" for number in range(layers)]
    raise ValueError(f"{type(model).__name__} has no list of decoder blocks: this adapter needs them")


def biased_modules(model: nn.Module) -> list[str]:
    """The full names of the modules that have a bias that can train: those of experts stay frozen."""
    return [
        name
        for name, module in model.named_modules()
        if module._parameters.get("bias") is not None and not is_experts(module)
    ]


def sublayer_ends(model: nn.Module) -> list[str]:
    """The full names of the last linear of the attention and of the last linear of the MLP, for each decoder block.

    Raises:
        ValueError: the model has no decoder blocks, or a block is not an attention and an MLP made of linears.
    """
    d, linears, found = model.config.get_text_config().hidden_size, all_linears(model), []
    for block in decoder_blocks(model)[1]:
        parts: dict[str, str] = {}  # OPT has no MLP module: its linears belong to the block itself
        for name in linears:
            if name.startswith(f"{block}."):
                part, dot, _ = name.removeprefix(f"{block}.").partition(".")
                parts[part if dot else ""] = name
        for name in parts.values():
            if is_experts(linears[name]):
                raise ValueError(f"{block} ends with experts, which this adapter is not for: name target_modules=[…]")
        if len(parts) != 2 or any(weight_shape(linears[name])[0] != d for name in parts.values()):
            ends = ", ".join(name.removeprefix(f"{block}.") for name in parts.values()) or "no linears"
            raise ValueError(
                f"{block} must have an attention and an MLP that each end with a linear of width {d}, but has {ends}: "
                "name the linears with target_modules=[…]"
            )
        found += parts.values()
    return found


def matches(pattern: str | Iterable[str], name: str) -> bool:
    """True if `pattern` matches `name` by PEFT's rules.

    Args:
        pattern: a regular expression that must match the full name, or suffixes that consist of whole parts of names.
            The suffix of a module called `experts` also means the linears in it.
    """
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    parent = name.rpartition(".")[0]
    names = (name, parent) if f".{parent}".endswith(".experts") else (name,)
    return any(f".{one}".endswith(f".{suffix}") for suffix in pattern for one in names)


def match_targets(names: Iterable[str], target_modules: str | list[str]) -> list[str]:
    """The names that `target_modules` matches by PEFT's rules.

    Args:
        target_modules: "all-linear", a list of suffixes (`q_proj` matches every `….q_proj`), or a regular expression
            that must match the full name.

    Raises:
        ValueError: no name matches, a suffix of the list matches no name, or the regular expression is invalid.
    """
    names = list(names)
    if target_modules == ALL_LINEAR:
        matched, idle = names, []
    elif isinstance(target_modules, str):
        compile_patterns("target_modules", [target_modules])
        matched, idle = [name for name in names if matches(target_modules, name)], []
    else:
        matched = [name for name in names if matches(target_modules, name)]
        idle = [suffix for suffix in target_modules if not any(matches([suffix], name) for name in names)]
    if idle or not matched:
        last_parts = sorted({name.rpartition(".")[2] for name in names})
        asked = f"target_modules={target_modules!r}" if not matched else f"{', '.join(idle)} of target_modules"
        raise ValueError(
            f"{asked} matches no linear of the model; it has {', '.join(last_parts)} "
            f"(full names such as {names[0] if names else 'none'})"
        )
    return matched


def find_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The full names of the linears of `model` that get an adapter of `config`.

    Raises:
        ValueError: a setting matches nothing in the model, or a layer is too small for its rank.
    """
    saved = find_saved(model, config.modules_to_save)
    if "target_modules" not in SETTINGS[config.adapter]:
        return []
    linears = decoder_linears(model) if config.target_modules == ALL_LINEAR else all_linears(model)
    asked = config.target_modules
    if config.adapter == "houlsby" and asked == ALL_LINEAR:
        asked = sublayer_ends(model)
    try:
        matched = match_targets(linears, asked)
    except ValueError as error:
        for name, reason in left_out(model).items():
            if asked != ALL_LINEAR and matches(asked, name):
                raise ValueError(f"target_modules: {name} cannot be adapted: {reason}") from error
        raise
    names = [name for name in matched if not any(f"{name}.".startswith(f"{module}.") for module in saved)]
    if config.exclude_modules:
        excluded = {name for name in names if matches(config.exclude_modules, name)}
        if not excluded and not any(matches(config.exclude_modules, name) for name in left_out(model)):
            raise ValueError(f"exclude_modules={config.exclude_modules!r} matches none of the target modules")
        names = [name for name in names if name not in excluded]
    if not names:
        raise ValueError("exclude_modules and modules_to_save leave no linear to put an adapter on")
    experts = [name for name in names if is_experts(linears[name])]
    if experts and config.adapter == "houlsby":
        raise ValueError(f"{experts[0]} has the weights of experts, which adapter=houlsby is not for: leave it out")
    if not experts and (config.experts is not None or config.shared_factor != "none"):
        raise ValueError("experts and shared_factor are about experts, and none of the adapted linears has theirs")
    for setting in ("rank_pattern", "alpha_pattern"):
        used = {matching_key(getattr(config, setting), name) for name in names}
        if idle := [key for key in getattr(config, setting) if key not in used]:
            raise ValueError(
                f"{setting}: {', '.join(idle)} matches no adapted linear that an earlier key does not match"
            )
    for name, most in _narrow(model, config, names).items():
        if matching_key(config.rank_pattern, name) is not None or most == max(_largest_ranks(model, names).values()):
            raise ValueError(f"rank {config.rank_of(name)} is out of range: {name} can have 1 to {most}")
    return names


def _largest_ranks(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    linears = all_linears(model)
    return {name: min(weight_shape(linears[name])[-2:]) for name in names}


def _narrow(model: nn.Module, config: AdapterConfig, names: Iterable[str]) -> dict[str, int]:
    """Those of the linears `names` that cannot have their rank in `config`, and the largest that they can have."""
    return {name: most for name, most in _largest_ranks(model, names).items() if config.rank_of(name) > most}


def fitted(model: nn.Module, config: AdapterConfig, names: Iterable[str]) -> AdapterConfig:
    """`config` with the largest rank that they can have for those of the linears `names` that are narrower than it, at
    the same scaling: gates of one row, keys of one head."""
    ranks, alphas = {}, {}
    for name, most in _narrow(model, config, names).items():
        key, share = f"^{re.escape(name)}", most / config.rank_of(name)
        ranks[key] = most
        alphas[key] = config.lora_alpha_of(name) * (share**0.5 if config.rslora else share)
    if not ranks:
        return config
    return replace(config, rank_pattern=ranks | config.rank_pattern, alpha_pattern=alphas | config.alpha_pattern)


def find_saved(model: nn.Module, modules_to_save: list[str]) -> list[str]:
    """The full names of the modules that `modules_to_save` matches. Modules inside another match are left out.

    Raises:
        ValueError: a suffix matches no module.
    """
    found = [name for name, _ in model.named_modules() if name and matches(modules_to_save, name)]
    if idle := [suffix for suffix in modules_to_save if not any(matches([suffix], name) for name in found)]:
        raise ValueError(f"modules_to_save: the model has no module {', '.join(idle)}")
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
