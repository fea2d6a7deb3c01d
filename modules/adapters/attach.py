"""Attach adapters to a model.

What an adapter is, and how several share a model: state.py.

    modules.attach(model, "dora", rank=16)                 a new adapter named "default"; it becomes active
    modules.load_adapter(model, "dir", name="b")           another adapter; it becomes active
    modules.set_adapter(model, "default")                  activate the first again; None: the base alone
    modules.add_weighted_adapter(model, {"default": 0.5, "b": 0.5}, "mix")
    modules.merge(model); modules.unmerge(model)           replace the active adapter by dense layers, and undo it
    modules.detach(model)                                  the model as before the first adapter
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace

from torch import nn

from modules.adapters.base_print import base_print
from modules.adapters.bottleneck import BottleneckLinear
from modules.adapters.config import ALL_LINEAR, REACHED, SETTINGS, AdapterConfig
from modules.adapters.init import check_init, initialise, principal_inputs
from modules.adapters.linear4bit import take_over_linear4bit
from modules.adapters.model_code import changed_in_place
from modules.adapters.own import own_copy
from modules.adapters.prefix import prefix_modules
from modules.adapters.saving import save_as_adapter
from modules.adapters.state import DEFAULT, Adapter, AdapterState, set_adapter, state_of
from modules.adapters.targets import (
    all_linears,
    biased_modules,
    decoder_linears,
    find_saved,
    find_targets,
    fitted,
    wrapped_linears,
)
from modules.experts import DoRAExperts, LoRAExperts, is_experts
from modules.linear import DoRALinear, LoRALinear, NF4Linear
from modules.mixtures import give_back_experts, reached_experts, take_over_experts

ADAPTERS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}
OF_EXPERTS: dict[str, type[LoRALinear]] = {"lora": LoRAExperts, "dora": DoRAExperts}

PEFT_NAMES = {"r": "rank", "lora_dropout": "dropout", "use_rslora": "rslora", "init_lora_weights": "init"}
PEFT_NAMES |= {"use_dora": "adapter", "peft_type": "adapter", "adapter_name": "name"}


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
    """Freeze `model`, attach a new adapter to its target linears in place, and make the adapter active.

    Args:
        adapter, rank, lora_alpha, target_modules, dropout: see `AdapterConfig`.
        more: exclude_modules, rank_pattern, alpha_pattern, modules_to_save, bias, rslora, init, freeze_A, experts,
            shared_factor, prefix_tokens and infix_tokens: see `AdapterConfig`.
        name: of the adapter. Other adapters of the model are kept.
        calibration: batches for init="eva" and experts="reached". Each is a dict of keyword arguments of the model, on
            its device.
        progress: wraps the iteration over layer names while A and B are initialised, e.g. in a progress bar.

    Returns:
        The full names of the adapted linears.

    Raises:
        ValueError: the adapter or a setting is unknown, no linear matches, a rank is too large for every layer, or the
            name is taken. The model is then unchanged, but linears of bitsandbytes have become NF4Linears.
        TypeError: a setting of that name does not exist.
    """
    for wrong in more.keys() - {f.name for f in fields(AdapterConfig)}:
        hint = f"{PEFT_NAMES[wrong]}= here" if wrong in PEFT_NAMES else "not one of " + ", ".join(SETTINGS["lora"])
        raise TypeError(f"attach: {wrong}= is {hint}")
    config = AdapterConfig(adapter, rank, lora_alpha, target_modules, dropout, **more)
    active = prepare_to_add(model, name)
    try:
        names = find_targets(model, config)
        config = fitted(model, config, names)
        linears = all_linears(model)
        check_init(config.init, {target: linears[target] for target in names})
        _check_calibration(config, calibration)
        own = own_tensors(model, config, names)
        eva = {}
        if config.init == "eva":
            eva = principal_inputs(model, {n: config.rank_of(n) for n in names}, calibration)
        if config.experts == REACHED:
            reached = reached_experts(model, calibration)
            modules = {target: target.rpartition(".")[0] for target in names if is_experts(linears[target])}
            config = replace(config, experts={t: reached[module] for t, module in modules.items() if reached[module]})
            names = [target for target in names if target not in modules or target in config.experts]
        add_adapter(model, name, config, names, own)
    except ValueError:
        give_up_adding(model, active)
        raise
    for target in progress(names):
        layer = model.get_submodule(target)
        initialise(layer, config.init)
        if target in eva:
            layer.start_at(eva[target], layer.lora_B)
    return names


def _check_calibration(config: AdapterConfig, calibration: Iterable[dict] | None) -> None:
    """Raise ValueError if `config` needs calibration batches and has none, or has some that it does not need."""
    needed = [f"init={config.init}"] * (config.init == "eva") + [f"experts={REACHED}"] * (config.experts == REACHED)
    if needed and calibration is None:
        raise ValueError(f"{needed[0]} needs calibration batches: attach(…, calibration=[{{'input_ids': …}}, …])")
    if calibration is not None and not needed:
        raise ValueError(f"calibration batches are for init=eva and experts={REACHED}, not init={config.init}")


def prepare_to_add(model: nn.Module, name: str) -> str | None:
    """Check that an adapter `name` can be added, deactivate the active adapter and return its name.

    Linears of bitsandbytes become NF4Linears, and the experts of a layer modules.

    Raises:
        ValueError: the name is taken, a part of the model has an adapter of its own, or a linear of bitsandbytes cannot
            be taken over.
    """
    refuse_parts(model)
    take_over_linear4bit(model)
    take_over_experts(model)
    state = state_of(model)
    if state is None:
        return None
    if name in state.named:
        raise ValueError(f"the model has an adapter {name!r} already: give another name or detach it first")
    active = state.active
    set_adapter(model, None)
    return active


def give_up_adding(model: nn.Module, active: str | None) -> None:
    """Undo `prepare_to_add`, which returned `active`."""
    set_adapter(model, active)
    if state_of(model) is None:
        give_back_experts(model)


def refuse_parts(model: nn.Module) -> None:
    """Raise ValueError if an adapter was attached to a part of `model`, and not to `model` itself."""
    state = state_of(model)
    if unknown := [path for path in wrapped_linears(model) if state is None or path not in state.base]:
        raise ValueError(f"{unknown[0]} has an adapter that was attached to a part of the model: use that part instead")


def own_tensors(model: nn.Module, config: AdapterConfig, names: list[str]) -> dict[str, list[str]]:
    """The tensors of the base that `config` trains beside the adapted linears `names`.

    Returns:
        The names of the tensors of each module, by the module's full name.

    Raises:
        ValueError: such a tensor is packed.
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
    """Make the adapter of `config` and activate it. Until then the base alone must be in the tree.

    Args:
        names: the full names of the linears to adapt. A and B are initialised as `default`.
        own: tensors of the base that train beside them, see `own_tensors`.

    Raises:
        ValueError: the model has no decoder that can have a prefix. The model is then unchanged.
    """
    state = state_of(model)
    if state is None:
        state = AdapterState([p for p in model.parameters() if p.requires_grad], base_print=base_print(model))
    linears = all_linears(model)
    modules: dict[str, nn.Module] = {}
    for path, tensors in own.items():
        modules[path] = own_copy(model.get_submodule(path), tensors)
    changed = changed_in_place(model) if config.adapter == "dora" else set()
    for path in names:
        modules[path] = _layer(linears[path], path, config)
        if any(f"{path}.".startswith(f"{result}.") for result in changed):
            modules[path].copies_result = True
    if config.adapter.startswith("prefix"):
        modules |= prefix_modules(model, config)
    base = {path: model.get_submodule(path) for path in modules}
    for parameter in state.trainable:
        parameter.requires_grad_(False)
    state.base |= base
    state.named[name] = Adapter(config, modules, own)
    model._adapters = state
    save_as_adapter(model)
    set_adapter(model, name)


def _layer(linear: nn.Module, path: str, config: AdapterConfig) -> LoRALinear | BottleneckLinear:
    """The module that replaces `linear`, whose full name in the model is `path`."""
    if config.adapter == "houlsby":
        return BottleneckLinear(linear, config.rank_of(path))
    kinds = OF_EXPERTS if is_experts(linear) else ADAPTERS
    layer = kinds[config.adapter](
        linear, config.rank_of(path), config.lora_alpha_of(path), config.dropout, config.rslora
    )
    if is_experts(linear):
        if (numbers := config.experts_of(path)) is not None:
            layer.choose(numbers)
        if config.shared_factor != "none":
            layer.share(config.shared_factor)
    layer.lora_A.requires_grad_(not config.freeze_A)
    if config.bias != "none":
        layer.train_bias()
    return layer
