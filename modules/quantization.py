"""Pack the linears of a model in NF4, and unpack them."""

from collections.abc import Callable, Iterable

from torch import nn

from modules.adapter import refuse_parts, replace_module, state_of
from modules.init import loftq
from modules.linear import NF4Linear, dense_weight
from modules.targets import decoder_linears


def quantize(
    model: nn.Module,
    blocksize: int = 64,
    double_quant: bool = True,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Pack every decoder linear of `model` in NF4, in place; each dense weight is released as its layer is packed.

    Adapters that are on the model stay on it; one with init="loftq" begins here.

    Args:
        blocksize, double_quant: see `kernels.quantize_4bit`.
        progress: wraps the iteration over the layers' names, e.g. in a progress bar.

    Raises:
        ValueError: adapters are merged, or train a linear whole; the model is unchanged.
    """
    refuse_parts(model)
    linears = decoder_linears(model)
    state = state_of(model)
    if state is not None:
        if state.merged:
            raise ValueError("the adapter is merged: unmerge(model), or merge(model, unload=True), before quantizing")
        own = [path for adapter in state.named.values() for path in adapter.own if path in linears]
        if own:
            raise ValueError(f"an adapter trains {own[0]} itself, or its bias: quantize before attaching it")
    for name in progress([name for name, linear in linears.items() if not isinstance(linear, NF4Linear)]):
        linear = linears.pop(name)
        packed = NF4Linear.from_linear(linear, blocksize, double_quant).train(linear.training)
        if linear is model.get_submodule(name):
            replace_module(model, name, packed)
        if state is None or name not in state.base:
            continue
        state.base[name] = packed
        for adapter in state.named.values():
            if layer := adapter.modules.get(name):
                layer.set_base(packed)
                if adapter.config.init == "loftq":
                    loftq(layer, dense_weight(linear))


def dequantize(model: nn.Module) -> None:
    """Unpack every NF4 linear of `model` that has no adapter, in place, in the dtype it computes in."""
    for name, linear in decoder_linears(model).items():
        if linear is model.get_submodule(name) and isinstance(linear, NF4Linear):
            replace_module(model, name, linear.dequantize().train(linear.training))
