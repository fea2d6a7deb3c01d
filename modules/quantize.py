"""Pack the linears of a model in four bits, and unpack them."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from kernels.codebook import default_blocksize
from kernels.weight import check_blocksize, check_double_quant, check_quant_type
from modules.adapters.attach import refuse_parts
from modules.adapters.base_print import base_print
from modules.adapters.config import changes_base, quantized_start
from modules.adapters.init import pack
from modules.adapters.linear4bit import take_over_linear4bit
from modules.adapters.state import replace_module, state_of
from modules.adapters.targets import decoder_linears
from modules.experts import pack_linear
from modules.linear import NF4Linear
from modules.mixtures import give_back_experts, take_over_experts


def quantize(
    model: nn.Module,
    blocksize: int | Mapping[str, int] | None = None,
    double_quant: bool = True,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    quant_type: str = "nf4",
) -> None:
    """Pack every decoder linear of `model` in four bits, in place. Each dense weight is released once it is packed.

    The experts of a layer are linears too: their weight [experts, out, in] is packed as one. The model keeps its
    adapters. Those with init="loftq" or "qpissa" are initialised here. qpissa and loftq_iter_N choose codes for the
    adapter, not the codes nearest to the weights, so the model must have no other adapter.

    Args:
        blocksize: see `kernels.quantize_4bit`: one for all linears, or one for each linear by its full name; by
            default 64, or the one that a block format has.
        double_quant, quant_type: see `kernels.quantize_4bit`.
        progress: wraps the iteration over layer names, e.g. in a progress bar.

    Raises:
        ValueError: a block size or the data type is unknown, a linear has no block size, an adapter is merged, an
            adapter trains a linear itself, or one of several adapters changes the base. The model is then unchanged.
    """
    refuse_parts(model)
    check_quant_type(quant_type)
    check_double_quant(double_quant, quant_type)
    take_over_linear4bit(model)
    take_over_experts(model)
    linears = decoder_linears(model)
    state = state_of(model)
    if state is not None:
        if state.merged:
            raise ValueError("the adapter is merged: unmerge(model), or merge(model, unload=True), before quantizing")
        own = [path for adapter in state.named.values() for path in adapter.own if path in linears]
        if own:
            raise ValueError(f"an adapter trains {own[0]} itself, or its bias: quantize before attaching it")
        changing = [name for name, adapter in state.named.items() if changes_base(adapter.config.init)]
        if changing and len(state.named) > 1:
            init = state.named[changing[0]].config.init
            raise ValueError(f"init={init} of the adapter {changing[0]!r} changes the base: detach the other adapters")
    dense = [name for name, linear in linears.items() if not isinstance(linear, NF4Linear)]
    blocksize = default_blocksize(quant_type) if blocksize is None else blocksize
    sizes = blocksize if isinstance(blocksize, Mapping) else dict.fromkeys(dense, blocksize)
    for name in dense:
        if name not in sizes:
            raise ValueError(f"blocksize has no entry for {name}")
        check_blocksize(sizes[name], quant_type)
    for name in progress(dense):
        linear = linears.pop(name)
        over = [] if state is None else [a for a in state.named.values() if name in a.modules]
        how = (sizes[name], double_quant, quant_type)
        packed = None
        for adapter in over:
            if quantized_start(adapter.config.init):
                packed = pack(adapter.modules[name], adapter.config.init, linear, *how)
        packed = packed or pack_linear(linear, *how)
        packed.train(linear.training)
        if linear is model.get_submodule(name):
            replace_module(model, name, packed)
        if state is not None and name in state.base:
            state.base[name] = packed
        for adapter in over:
            adapter.modules[name].set_base(packed)
    if state is not None:
        state.base_print = base_print(model)


def dequantize(model: nn.Module) -> None:
    """Unpack every packed linear of `model` that has no adapter, in place, to the dtype it computes in.

    Experts are parameters of three dimensions again, unless they have an adapter.
    """
    for name, linear in decoder_linears(model).items():
        if linear is model.get_submodule(name) and isinstance(linear, NF4Linear):
            replace_module(model, name, linear.dequantize().train(linear.training))
    if state_of(model) is None:
        give_back_experts(model)
