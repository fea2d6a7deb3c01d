"""Pack the linears of a model in NF4, and unpack them."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from kernels.quant_state import check_blocksize
from modules.adapter import refuse_parts, replace_module, state_of
from modules.init import loftq
from modules.linear import NF4Linear, dense_weight
from modules.targets import decoder_linears


def quantize(
    model: nn.Module,
    blocksize: int | Mapping[str, int] = 64,
    double_quant: bool = True,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Pack every decoder linear of `model` in NF4, in place; each dense weight is released as its layer is packed.

    Adapters that are on the model stay on it; one with init="loftq" begins here.

    Args:
        blocksize: see `kernels.quantize_4bit`; of each linear by its full name, or one for all.
        double_quant: see `kernels.quantize_4bit`.
        progress: wraps the iteration over the layers' names, e.g. in a progress bar.

    Raises:
        ValueError: no such block size, or none for a linear; adapters are merged, or train a linear whole; the model is
            unchanged.
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
    dense = [name for name, linear in linears.items() if not isinstance(linear, NF4Linear)]
    sizes = blocksize if isinstance(blocksize, Mapping) else dict.fromkeys(dense, blocksize)
    for name in dense:
        if name not in sizes:
            raise ValueError(f"blocksize has no entry for {name}")
        check_blocksize(sizes[name])
    for name in progress(dense):
        linear = linears.pop(name)
        packed = NF4Linear.from_linear(linear, sizes[name], double_quant).train(linear.training)
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
