"""Adapters of experts in PEFT's layout (`target_parameters`).

PEFT wraps the module `experts` once for each parameter that is adapted, the first one innermost. With both
projections adapted that makes, of E experts,

    <path>.experts.base_layer.lora_A.weight     [E · rank, in], of gate_up_proj; row e · rank + j is row j of expert e
    <path>.experts.base_layer.lora_B.weight     [out, rank · E]; column j · E + e is column j of expert e
    <path>.experts.lora_A.weight, …lora_B.weight    the same of down_proj

Of Llama 4, whose weights [E, in, out] PEFT takes for [E, out, in], A and B change places.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from modules.adapters.state import Adapter
from modules.experts import is_experts
from modules.linear import LoRALinear
from modules.mixtures import IN_OUT, PROJECTIONS


def of_experts(adapter: Adapter) -> list[str]:
    """The full names of the experts' linears that `adapter` adapts."""
    return [path for path, layer in adapter.modules.items() if isinstance(layer, LoRALinear) and is_experts(layer.base)]


def fits_peft(adapter: Adapter) -> bool:
    """False if PEFT cannot have such an adapter: DoRA on experts."""
    return adapter.config.adapter == "lora" or not of_experts(adapter)


def peft_paths(paths: Iterable[str]) -> dict[str, str]:
    """PEFT's names of the wrappers of experts' linears, by their full names."""
    by_module: dict[str, list[str]] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        by_module.setdefault(module, []).append(name)
    found = {}
    for module, names in by_module.items():
        for depth, name in enumerate(sorted(names, key=PROJECTIONS.index, reverse=True)):
            found[f"{module}.{name}"] = module + depth * ".base_layer"
    return found


def to_peft(model: nn.Module, paths: Iterable[str], state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`state` with the tensors of the experts' linears `paths` under PEFT's names and in its layout."""
    state = dict(state)
    for path, wrapper in peft_paths(paths).items():
        lora_A, lora_B = (state.pop(f"{prefix}{path}.lora_{factor}.weight") for factor in "AB")
        if _changes_places(model, path):
            lora_A, lora_B = lora_B.mT, lora_A.mT
        state[f"{prefix}{wrapper}.lora_A.weight"] = lora_A.reshape(-1, lora_A.shape[2])
        state[f"{prefix}{wrapper}.lora_B.weight"] = lora_B.permute(1, 2, 0).reshape(lora_B.shape[1], -1)
    return state


def from_peft(model: nn.Module, paths: Iterable[str], state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `to_peft`.

    Raises:
        ValueError: a tensor is not that of as many experts as the model's layer has.
    """
    state = dict(state)
    for path, wrapper in peft_paths(paths).items():
        keys = [f"{prefix}{wrapper}.lora_{factor}.weight" for factor in "AB"]
        if any(key not in state for key in keys):
            continue  # whoever compares the names will say so
        lora_A, lora_B = (state.pop(key) for key in keys)
        experts = model.get_submodule(path.rpartition(".")[0]).num_experts
        if lora_A.dim() != 2 or lora_A.shape[0] % experts or lora_B.dim() != 2 or lora_B.shape[1] != lora_A.shape[0]:
            raise ValueError(
                f"{path}: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} are not of the model's "
                f"{experts} experts"
            )
        lora_A = lora_A.view(experts, -1, lora_A.shape[1])
        lora_B = lora_B.view(lora_B.shape[0], -1, experts).permute(2, 0, 1)
        if _changes_places(model, path):
            lora_A, lora_B = lora_B.mT, lora_A.mT
        state |= {f"{prefix}{path}.lora_A.weight": lora_A, f"{prefix}{path}.lora_B.weight": lora_B}
    return state


def _changes_places(model: nn.Module, path: str) -> bool:
    module = model.get_submodule(path.rpartition(".")[0])
    return getattr(module, "own_class", type(module)).__name__ in IN_OUT


def experts_in_file(raw: dict, linears: Mapping[str, nn.Module]) -> list[str]:
    """The full names of those of `linears` that `target_parameters` in `raw`, an adapter_config.json, means.

    Raises:
        ValueError: a suffix matches no experts: it means another parameter, or none.
    """
    asked = raw.get("target_parameters") or []
    experts = [name for name, linear in linears.items() if is_experts(linear)]
    names = [name for name in experts if any(f".{name}".endswith(f".{suffix}") for suffix in asked)]
    if idle := [suffix for suffix in asked if not any(f".{name}".endswith(f".{suffix}") for name in names)]:
        raise ValueError(f"target_parameters: {idle[0]} matches no experts of the model")
    return names
