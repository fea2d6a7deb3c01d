"""Merge the active adapter of a model into dense layers, undo it, and add adapters up."""

import re
from dataclasses import dataclass

import torch
from torch import nn

from modules.adapters.attach import add_adapter, prepare_to_add
from modules.adapters.config import AdapterConfig
from modules.adapters.own import merged_copy
from modules.adapters.state import forget, named_adapter, replace_module, set_adapter, state_of
from modules.experts import pack_linear
from modules.linear import LoRALinear, NF4Linear, dense_weight
from modules.mixtures import give_back_experts


@dataclass(frozen=True)
class Requantized:
    """The loss of packing a merged layer again, relative to ‖W′‖ (Frobenius norm), W′ the merged weight.

    Attributes:
        error: ‖NF4(W′) − W′‖ / ‖W′‖, at the block size that the base had.
        update: ‖W′ − W‖ / ‖W′‖, the adapter's change. If `error` is larger, packing hides the adapter.
    """

    error: float
    update: float


def can_merge(config: AdapterConfig) -> bool:
    """True if dense layers can compute the same as an adapter of `config`. Networks and tokens cannot be merged."""
    return config.adapter not in ("houlsby", "prefix_embed", "prefix_layer")


@torch.no_grad()
def merge(model: nn.Module, unload: bool = False, report: bool = True) -> dict[str, Requantized]:
    """Replace the active adapter by dense layers that compute the same. Over NF4 they have the dtype it computes in.

    Args:
        unload: drop base and adapters layer by layer, which frees their memory. The model is then a plain one.
            Without `unload` they stay in memory, and `unmerge` brings them back.
        report: measure the loss of packing the layers again. This takes as long as packing the model.

    Returns:
        The loss of packing each layer over NF4 again, by full name; empty without `report`.

    Raises:
        ValueError: no adapter is active, it is merged already, or its kind cannot be merged.
    """
    adapter, state = named_adapter(model), state_of(model)
    if state.merged:
        raise ValueError(f"the adapter {state.active!r} is merged already")
    if not can_merge(adapter.config):
        raise ValueError(f"the adapter {state.active!r} is {adapter.config.adapter}, which cannot be merged")
    if unload:
        state.named = {state.active: adapter}
    requantized = {}
    for path in sorted(adapter.modules):
        module = adapter.modules[path]
        if isinstance(module, LoRALinear):
            dense = module.merge()
            if report and isinstance(module.base, NF4Linear):
                requantized[path] = _requantized(module, dense)
        else:
            dense = merged_copy(state.base[path], module, adapter.own[path])
        replace_module(model, path, dense.train(module.training))
        if unload:
            del adapter.modules[path], state.base[path], module
    state.merged, state.untied = True, _untie(model)
    if unload:
        give_back_experts(model)
        forget(model)
    return requantized


def _requantized(layer: LoRALinear, dense: nn.Module) -> Requantized:
    state = layer.base.quant_state
    packed = pack_linear(dense, state.blocksize, state.nested, state.quant_type)
    merged = dense_weight(dense).float()
    size = merged.norm().clamp(min=torch.finfo(torch.float32).tiny)
    error = (dense_weight(packed).float() - merged).norm() / size
    return Requantized(error.item(), ((merged - dense_weight(layer.base).float()).norm() / size).item())


def _untie(model: nn.Module) -> bool:
    """Set config.tie_word_embeddings to False if input and output embeddings differ now; True if it was changed."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not tied or not hasattr(model, "get_output_embeddings"):
        return False
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is tokens.weight:
        return False
    model.config.tie_word_embeddings = False
    return True


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: bring back the adapter and its base.

    Raises:
        ValueError: nothing is merged.
    """
    state = state_of(model)
    if state is None or not state.merged:
        raise ValueError("no adapter of the model is merged")
    set_adapter(model, state.active)


@torch.no_grad()
def add_weighted_adapter(model: nn.Module, weights: dict[str, float], name: str) -> list[str]:
    """Add and activate an adapter whose update is exactly the weighted sum of the updates of LoRA adapters.

    Its rank in a layer is the sum of their ranks.

    Args:
        weights: the weight of each adapter, by the adapter's name.
        name: of the new adapter.

    Returns:
        The full names of the adapted linears.

    Raises:
        ValueError: an adapter does not exist, is not LoRA, or trains biases or whole modules; or `name` is taken.
    """
    parts = {part: named_adapter(model, part) for part in weights}
    if not parts:
        raise ValueError("no adapter to add: name one or more")
    for part, adapter in parts.items():
        for feature, found in (
            (adapter.config.adapter, adapter.config.adapter != "lora"),
            ("modules_to_save", adapter.config.modules_to_save),
            ("bias", adapter.config.bias != "none"),
        ):
            if found:
                raise ValueError(f"the adapter {part!r} has {feature}, which cannot be summed: only LoRA layers can")
    factors: dict[str, list[tuple]] = {}
    for part, adapter in parts.items():
        for path, layer in adapter.modules.items():
            lora_A, lora_B = layer.factors()
            factors.setdefault(path, []).append((lora_A, weights[part] * layer.scaling * lora_B))
    ranks = {path: sum(lora_A.shape[-2] for lora_A, _ in pairs) for path, pairs in factors.items()}
    rank = max(ranks.values())
    patterns = {f"^{re.escape(path)}": smaller for path, smaller in ranks.items() if smaller != rank}
    prepare_to_add(model, name)
    config = AdapterConfig("lora", rank, rank, list(ranks), rank_pattern=patterns, alpha_pattern=patterns)
    add_adapter(model, name, config, list(ranks), {})
    for path, pairs in factors.items():
        lora_A, lora_B = (torch.cat(matrices, dim) for matrices, dim in zip(zip(*pairs), (-2, -1)))
        model.get_submodule(path).start_at(lora_A, lora_B)
    return list(ranks)
