"""Find the linears of a model, pack them in NF4, attach adapters to them."""

import re
from collections.abc import Callable, Iterable

from torch import nn

from modules.linear import DoRALinear, LoRALinear, NF4Linear

ADAPTERS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}
ALL_LINEAR = "all-linear"


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear | NF4Linear]:
    """Every linear of `model` by its full name, but for the output embeddings (lm_head)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | NF4Linear) and module is not head
    }


def adapted_linears(model: nn.Module) -> dict[str, LoRALinear]:
    """The linears with an adapter, by their full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantize(
    model: nn.Module,
    blocksize: int = 64,
    double_quant: bool = True,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Pack every decoder linear of `model` in NF4, in place; each dense weight is released as its layer is packed.

    Args:
        blocksize, double_quant: see `kernels.quantize_4bit`.
        progress: wraps the iteration over the layers' names, e.g. in a progress bar.
    """
    for name in progress(list(decoder_linears(model))):
        replace_module(model, name, NF4Linear.from_linear(model.get_submodule(name), blocksize, double_quant))


def match_targets(names: Iterable[str], target_modules: str | list[str]) -> list[str]:
    """Those of `names` that `target_modules` means, as PEFT reads it.

    Args:
        target_modules: "all-linear", a list of suffixes (`q_proj` means every `….q_proj`), or a regular expression
            that must match the full name.

    Raises:
        ValueError: nothing matches, or the regular expression is not one.
    """
    names = list(names)
    if target_modules == ALL_LINEAR:
        matched = names
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from error
        matched = [name for name in names if pattern.fullmatch(name)]
    else:
        matched = [name for name in names if any(f".{name}".endswith(f".{suffix}") for suffix in target_modules)]
    if not matched:
        last_parts = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"target_modules={target_modules!r} matches no linear of the model; it has {', '.join(last_parts)} "
            f"(full names such as {names[0] if names else 'none'})"
        )
    return matched


def attach(
    model: nn.Module,
    adapter: str,
    rank: int = 16,
    lora_alpha: float | None = None,
    target_modules: str | list[str] = ALL_LINEAR,
    dropout: float = 0.0,
) -> list[str]:
    """Freeze `model` and put an adapter on its target linears, in place.

    Args:
        adapter: "lora" or "dora".
        rank, dropout: see `LoRALinear`.
        lora_alpha: by default 2 · rank.
        target_modules: see `match_targets`.

    Returns:
        The full names of the adapted linears.

    Raises:
        ValueError: an unknown adapter, nothing to attach to, a rank a layer cannot have; the model is unchanged.
    """
    if adapter not in ADAPTERS:
        raise ValueError(f"adapter {adapter!r} is not one of {', '.join(ADAPTERS)}")
    linears = decoder_linears(model)
    names = match_targets(linears, target_modules)
    for name in names:
        largest = min(linears[name].in_features, linears[name].out_features)
        if not 1 <= rank <= largest:
            raise ValueError(f"rank {rank} is out of range: {name} takes 1 to {largest}")
    model.requires_grad_(False)
    for name in names:
        replace_module(
            model, name, ADAPTERS[adapter](linears[name], rank, 2 * rank if lora_alpha is None else lora_alpha, dropout)
        )
    return names
