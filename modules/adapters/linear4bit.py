"""Models that transformers loaded with BitsAndBytesConfig: their linears, taken over as they are."""

import sys

import torch
from torch import nn

from kernels import QuantState
from kernels.codebook import BLOCKSIZES, NESTED_BLOCKSIZE
from modules.adapters.state import replace_module
from modules.linear import NF4Linear


def take_over_linear4bit(model: nn.Module) -> None:
    """Put an NF4Linear in the place of every Linear4bit of bitsandbytes. It has the same codes and constants: nothing
    is copied or unpacked. From then on the model is like one that `load_bnb4` has loaded.

    Raises:
        ValueError: a linear is packed in a way that NF4Linear cannot hold. The model is then unchanged.
    """
    source = sys.modules.get("bitsandbytes.nn")  # such a linear exists only if this is imported already
    if source is None:
        return
    found = {name: module for name, module in model.named_modules() if isinstance(module, source.Linear4bit)}
    if eight_bit := [name for name, module in model.named_modules() if isinstance(module, source.Linear8bitLt)]:
        raise ValueError(f"{eight_bit[0]} is packed in 8 bits: load the model with load_in_4bit=True, or dense")
    packed = {name: _packed(name, linear).train(linear.training) for name, linear in found.items()}
    for name, linear in packed.items():
        replace_module(model, name, linear)
    if packed and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        model.hf_quantizer, model.is_loaded_in_4bit = None, False


def _packed(name: str, linear: nn.Module) -> NF4Linear:
    """The NF4Linear of a Linear4bit."""
    state = linear.weight.quant_state
    if state is None:
        raise ValueError(f"{name} is not packed yet: move the model to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}: bitsandbytes has rounded its constants for evaluation on this CPU: load the model again, and "
            "attach before its first forward pass"
        )
    if state.blocksize not in BLOCKSIZES or (state.nested and state.state2.blocksize != NESTED_BLOCKSIZE):
        raise ValueError(f"{name} has blocks of {state.blocksize}, which cannot be read")
    nested_absmax = nested_offset = None
    if state.nested:
        nested_absmax, nested_offset = state.state2.absmax, torch.as_tensor(state.offset, dtype=torch.float32)
        nested_offset = nested_offset.to(nested_absmax.device)
    of = state.absmax, torch.Size(state.shape), state.dtype, state.blocksize
    codes = linear.weight.data.view(-1).view(torch.uint8)
    quant_state = QuantState(*of, nested_absmax, nested_offset, state.quant_type)
    was = getattr(linear, "source_cls", nn.Linear)  # transformers says which class it has packed
    return NF4Linear(codes, quant_state, linear.bias, conv1d=was.__name__ == "Conv1D")
