"""Put adapters on a model, switch between them, merge them, take them off.

An adapter is a set of modules that take the place of the model's own: a LoRALinear, DoRALinear or BottleneckLinear over
each target linear, which it holds as its base, a decoder that reads a prefix, and own copies (own.py) of
modules that train whole or in their bias. Several named adapters share one base. Attaching, switching, merging and
detaching put modules into the tree and never write to a weight of the base, so the base comes back bit for bit. What is
in the tree is all that forward, parameters() and state_dict() see; what is not rests in `model._adapters` and follows
to the device when it is shown again.

    modules.attach(model, "dora", rank=16)                 a new adapter, named "default", shown
    modules.load_adapter(model, "dir", name="b")           another
    modules.set_adapter(model, "default")                  show that one; None: the base alone
    modules.add_weighted_adapter(model, {"default": 0.5, "b": 0.5}, "mix")
    modules.adapters.merge(model); modules.unmerge(model)           the shown one as dense layers, and back
    modules.detach(model)                                  the model as it was
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from modules.adapters.bottleneck import BottleneckLinear
from modules.adapters.config import ALL_LINEAR, AdapterConfig
from modules.adapters.init import check_init, initialise, principal_inputs
from modules.adapters.own import own_copy
from modules.adapters.prefix import prefix_modules
from modules.adapters.targets import (
    all_linears,
    biased_modules,
    decoder_linears,
    find_saved,
    find_targets,
    wrapped_linears,
)
from modules.linear import DoRALinear, LoRALinear, NF4Linear

ADAPTERS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}
DEFAULT = "default"


@dataclass
class Adapter:
    """One named adapter.

    Attributes:
        config: what it was made from.
        modules: what takes the place of the base's modules, by full name.
        own: of the own copies among them, the names of the tensors that are their own.
    """

    config: AdapterConfig
    modules: dict[str, nn.Module]
    own: dict[str, list[str]]


@dataclass
class AdapterState:
    """What is on a model.

    Attributes:
        base: the base's modules that adapters take the place of, by full name.
        trainable: the base's parameters that trained before adapters froze them.
        named: the adapters.
        active: the one in the tree; None: the base alone.
        merged: it is there as dense layers.
        untied: to merge, config.tie_word_embeddings was set to False.
    """

    trainable: list[nn.Parameter]
    base: dict[str, nn.Module] = field(default_factory=dict)
    named: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    merged: bool = False
    untied: bool = False


def state_of(model: nn.Module) -> AdapterState | None:
    """What is on `model`, None if it has no adapter."""
    return getattr(model, "_adapters", None)


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """The adapters on `model` by name, the shown one and the others."""
    state = state_of(model)
    return {} if state is None else {name: adapter.config for name, adapter in state.named.items()}


def named_adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """The adapter `name` of `model`; None: the shown one.

    Raises:
        ValueError: it has none, or none of this name.
    """
    state = state_of(model)
    name = state.active if state and name is None else name
    if state is None or name not in state.named:
        there = ", ".join(adapters(model)) or "none"
        raise ValueError(f"the model has no adapter {'in use' if name is None else repr(name)}; it has {there}")
    return state.named[name]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _show(model: nn.Module, state: AdapterState, modules: dict[str, nn.Module]) -> None:
    """Put `modules` into the tree, and the base wherever they name nothing. Parents come before their children."""
    for name in sorted(state.base):
        old, new = model.get_submodule(name), modules.get(name, state.base[name])
        if new is not old:
            tensor = next(itertools.chain(old.parameters(), old.buffers()))
            replace_module(model, name, new.to(tensor.device).train(old.training))
    if state.untied:
        model.config.tie_word_embeddings, state.untied = True, False
    state.merged = False


def attach(
    model: nn.Module,
    adapter: str,
    rank: int = 16,
    lora_alpha: float | None = None,
    target_modules: str | list[str] = ALL_LINEAR,
    dropout: float = 0.0,
    *,
    name: str = DEFAULT,
    calibration: Iterable[dict] | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    **more,
) -> list[str]:
    """Freeze `model` and put a new adapter on its target linears, in place.

    Args:
        adapter, rank, lora_alpha, target_modules, dropout, and `more`, which are exclude_modules, rank_pattern,
            alpha_pattern, modules_to_save, bias, rslora, init, freeze_A, prefix_tokens and infix_tokens: see
            `AdapterConfig`.
        name: of the adapter. It is shown; others on the model stay there.
        calibration: batches for init="eva": keyword arguments of the model, on its device.
        progress: wraps the iteration over the layers' names in which A and B are initialised.

    Returns:
        The full names of the adapted linears.

    Raises:
        ValueError: an unknown adapter or setting, nothing to attach to, a rank a layer cannot have, a name that is
            taken; the model is unchanged.
    """
    config = AdapterConfig(adapter, rank, lora_alpha, target_modules, dropout, **more)
    shown = hide(model, name)
    try:
        names = find_targets(model, config)
        linears = all_linears(model)
        check_init(config.init, [linears[target] for target in names], calibration)
        own = own_tensors(model, config, names)
        eva = {} if calibration is None else principal_inputs(model, {n: config.rank_of(n) for n in names}, calibration)
        add_adapter(model, name, config, names, own)
    except ValueError:
        set_adapter(model, shown)
        raise
    for target in progress(names):
        layer = model.get_submodule(target)
        initialise(layer, config.init)
        if target in eva:
            layer.start_at(eva[target], layer.lora_B)
    return names


def hide(model: nn.Module, name: str) -> str | None:
    """Check that an adapter can be added as `name`; show the base alone and return which adapter was shown."""
    refuse_parts(model)
    state = state_of(model)
    if state is None:
        return None
    if name in state.named:
        raise ValueError(f"the model has an adapter {name!r} already: give another name or detach it first")
    shown = state.active
    set_adapter(model, None)
    return shown


def refuse_parts(model: nn.Module) -> None:
    """Raise ValueError if a part of `model` carries adapters that the model as a whole does not know of."""
    state = state_of(model)
    if unknown := [path for path in wrapped_linears(model) if state is None or path not in state.base]:
        raise ValueError(f"{unknown[0]} has an adapter that was attached to a part of the model: use that part instead")


def own_tensors(model: nn.Module, config: AdapterConfig, names: list[str]) -> dict[str, list[str]]:
    """The tensors of the base, beside the adapted linears, that `config` trains: names in a module, by its full name.

    Raises:
        ValueError: they are packed.
    """
    own = {}
    for root in find_saved(model, config.modules_to_save):
        for path, module in model.get_submodule(root).named_modules(prefix=root):
            if isinstance(module, NF4Linear):
                raise ValueError(f"modules_to_save: {path} is packed in NF4 and cannot train whole")
            buffers = module._buffers.keys() - module._non_persistent_buffers_set
            if tensors := [*module._parameters, *sorted(buffers)]:
                own[path] = [tensor for tensor in tensors if getattr(module, tensor) is not None]
    if config.bias == "all" or config.adapter == "bitfit":
        biased = biased_modules(model)
        if not biased and config.adapter == "bitfit":
            biased = list(decoder_linears(model))
        own |= {path: ["bias"] for path in biased if path not in own and path not in names}
    return own


def add_adapter(
    model: nn.Module, name: str, config: AdapterConfig, names: list[str], own: dict[str, list[str]]
) -> None:
    """Make the adapter of `config` over the linears `names` and the tensors `own` of the base, and show it.

    The base alone is in the tree. A and B begin as `default`.

    Raises:
        ValueError: the model has no decoder that could read a prefix; the model is unchanged.
    """
    state = state_of(model) or AdapterState([p for p in model.parameters() if p.requires_grad])
    linears = all_linears(model)
    modules: dict[str, nn.Module] = {}
    for path, tensors in own.items():
        modules[path] = own_copy(model.get_submodule(path), tensors)
    for path in names:
        modules[path] = _layer(linears[path], path, config)
    if config.adapter.startswith("prefix"):
        modules |= prefix_modules(model, config)
    base = {path: model.get_submodule(path) for path in modules}
    for parameter in state.trainable:
        parameter.requires_grad_(False)
    state.base |= base
    state.named[name] = Adapter(config, modules, own)
    model._adapters = state
    set_adapter(model, name)


def _layer(linear: nn.Module, path: str, config: AdapterConfig) -> LoRALinear | BottleneckLinear:
    """What takes the place of `linear`, which is `path` in the model."""
    if config.adapter == "houlsby":
        return BottleneckLinear(linear, config.rank_of(path))
    layer = ADAPTERS[config.adapter](
        linear, config.rank_of(path), config.lora_alpha_of(path), config.dropout, config.rslora
    )
    layer.lora_A.requires_grad_(not config.freeze_A)
    if config.bias != "none":
        layer.train_bias()
    return layer


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Show the adapter `name`; None: the base alone. No weight of the base is touched.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    if name is None and state_of(model) is None:
        return
    modules = {} if name is None else named_adapter(model, name).modules
    state = state_of(model)
    _show(model, state, modules)
    state.active = name


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name` off `model`; None: all of them, after which the model is as before the first.

    Raises:
        ValueError: the model has no adapter of this name.
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
        del model._adapters


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by full name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, lr: float, loraplus_lr_ratio: float = 1.0) -> list[dict]:
    """What trains, as the groups of a torch optimizer: B, magnitudes and biases learn at `lr` · `loraplus_lr_ratio`.

    LoRA+, Hayou et al. 2024; what counts to B is PEFT's choice: every parameter of one dimension does.
    """
    if loraplus_lr_ratio == 1.0:
        return [{"params": list(trainable_parameters(model).values()), "lr": lr}]
    slow, fast = [], []
    for name, parameter in trainable_parameters(model).items():
        (fast if name.endswith(".lora_B") or parameter.dim() == 1 else slow).append(parameter)
    groups = {"params": slow, "lr": lr}, {"params": fast, "lr": lr * loraplus_lr_ratio}
    return [group for group in groups if group["params"]]
