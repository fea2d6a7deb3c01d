"""The adapters of a model: which there are, and which is active.

An adapter is a set of modules that replace modules of the model:
    a LoRALinear, DoRALinear or BottleneckLinear for each target linear, which becomes its base; for the linears of
    experts a LoRAExperts or DoRAExperts;
    a decoder with a prefix (prefix.py);
    own copies (own.py) of modules that train whole, or whose bias trains.

Several named adapters share one base. At most one of them is active: its modules are in the model's tree, so forward,
parameters() and state_dict() see only it. The modules of the others, and the base's modules that the active adapter
replaces, are kept in `model._adapters`. They move to the model's device when they return to the tree. Attaching,
switching, merging and detaching never write to a weight of the base, so the base stays the same bit for bit.
"""

import itertools
from dataclasses import dataclass, field

from torch import nn

from modules.adapters.config import AdapterConfig
from modules.mixtures import give_back_experts

DEFAULT = "default"  # the name of an adapter that is given none


@dataclass
class Adapter:
    """One named adapter.

    Attributes:
        config: its settings.
        modules: its modules, by the full name of the module that each one replaces.
        own: for each own copy in `modules`, the names of the tensors that it does not share with the base.
    """

    config: AdapterConfig
    modules: dict[str, nn.Module]
    own: dict[str, list[str]]


@dataclass
class AdapterState:
    """The adapters of a model.

    Attributes:
        trainable: the base's parameters that were trainable before the first adapter froze them.
        base: the base's modules that adapters replace, by full name.
        named: the adapters by name.
        active: the name of the active adapter; None: the base alone is in the tree.
        merged: dense layers stand for the active adapter in the tree.
        untied: `merge` set config.tie_word_embeddings to False.
        base_print: the fingerprint of the base, as the first adapter found it or as it was packed since
            (base_print.py).
    """

    trainable: list[nn.Parameter]
    base: dict[str, nn.Module] = field(default_factory=dict)
    named: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    merged: bool = False
    untied: bool = False
    base_print: dict[str, str] = field(default_factory=dict)


def state_of(model: nn.Module) -> AdapterState | None:
    """The adapters of `model`; None if it has no adapter."""
    return getattr(model, "_adapters", None)


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """The settings of each adapter of `model`, by name, whether it is active or not."""
    state = state_of(model)
    return {} if state is None else {name: adapter.config for name, adapter in state.named.items()}


def named_adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """The adapter `name` of `model`; None: the active adapter.

    Raises:
        ValueError: the model has no adapter, or no adapter of this name.
    """
    state = state_of(model)
    name = state.active if state and name is None else name
    if state is None or name not in state.named:
        there = ", ".join(adapters(model)) or "none"
        raise ValueError(f"the model has no adapter {'in use' if name is None else repr(name)}; it has {there}")
    return state.named[name]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` into the tree of `model` under the full name `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Activate the adapter `name`; None: the base alone. No weight of the base is changed.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    state = state_of(model)
    if name is None and state is None:
        return
    modules = {} if name is None else named_adapter(model, name).modules
    for path in sorted(state.base):  # sorted: a parent comes before its children
        old, new = model.get_submodule(path), modules.get(path, state.base[path])
        if new is not old:
            tensor = next(itertools.chain(old.parameters(), old.buffers()))
            replace_module(model, path, new.to(tensor.device).train(old.training))
    if state.untied:
        model.config.tie_word_embeddings, state.untied = True, False
    state.active, state.merged = name, False


def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove the adapter `name` from `model`; None: all adapters, which gives back the model as before the first.

    Raises:
        ValueError: the model has no adapter, or no adapter of this name.
    """
    state = state_of(model)
    if state is None:
        raise ValueError("the model has no adapter to detach")
    if name is not None:
        named_adapter(model, name)
        if state.active == name:
            set_adapter(model, None)
        del state.named[name]
    if name is None or not state.named:
        set_adapter(model, None)
        for parameter in state.trainable:
            parameter.requires_grad_(True)
        give_back_experts(model)
        forget(model)


def forget(model: nn.Module) -> None:
    """Take off `model` what belongs to adapters: their state, and `save_pretrained` as saving.py made it."""
    del model._adapters
    vars(model).pop("save_pretrained", None)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of `model`, by full name: `torch.optim.AdamW(trainable_parameters(model).values())`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, lr: float, loraplus_lr_ratio: float = 1.0) -> list[dict]:
    """The trainable parameters of `model` as parameter groups of a torch optimizer (LoRA+, Hayou et al. 2024).

    Args:
        lr: of A and of every other matrix.
        loraplus_lr_ratio: B learns at `lr` · `loraplus_lr_ratio`. As in PEFT, so does every parameter of one
            dimension: magnitudes and biases.
    """
    if loraplus_lr_ratio == 1.0:
        return [{"params": list(trainable_parameters(model).values()), "lr": lr}]
    slow, fast = [], []
    for name, parameter in trainable_parameters(model).items():
        (fast if name.endswith(".lora_B") or parameter.dim() == 1 else slow).append(parameter)
    groups = {"params": slow, "lr": lr}, {"params": fast, "lr": lr * loraplus_lr_ratio}
    return [group for group in groups if group["params"]]
