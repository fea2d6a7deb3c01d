"""Linears with adapters over dense or packed weights; attach them to a model, save, load and train them.

Also here: quantize a model's linears, fuse its norms, MLPs and attention, optimizers with fp32 or 8-bit state, and
paging of that state.
"""

from modules.adapters.attach import attach
from modules.adapters.config import AdapterConfig
from modules.adapters.merge import add_weighted_adapter, merge, unmerge
from modules.adapters.state import adapters, detach, parameter_groups, set_adapter, trainable_parameters
from modules.adapters.targets import adapted_linears, decoder_linears
from modules.files.peft import load_adapter, save_adapter
from modules.fused import fuse, unfuse
from modules.linear import DoRALinear, LoRALinear, NF4Linear
from modules.optim import AdamW, AdamW8bit
from modules.paging import Paging
from modules.quantize import dequantize, quantize

__all__ = [
    "NF4Linear",
    "LoRALinear",
    "DoRALinear",
    "decoder_linears",
    "quantize",
    "dequantize",
    "AdapterConfig",
    "attach",
    "adapted_linears",
    "adapters",
    "set_adapter",
    "add_weighted_adapter",
    "merge",
    "unmerge",
    "detach",
    "trainable_parameters",
    "parameter_groups",
    "save_adapter",
    "load_adapter",
    "fuse",
    "unfuse",
    "AdamW",
    "AdamW8bit",
    "Paging",
]
