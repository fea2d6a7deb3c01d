"""Linears with adapters over dense or NF4 weights, and how to put them into a model and on disk."""

from modules.adapter import adapted_linears, attach, decoder_linears, quantize
from modules.checkpoint import load_adapter, save_adapter
from modules.linear import DoRALinear, LoRALinear, NF4Linear

__all__ = [
    "NF4Linear",
    "LoRALinear",
    "DoRALinear",
    "decoder_linears",
    "quantize",
    "attach",
    "adapted_linears",
    "save_adapter",
    "load_adapter",
]
