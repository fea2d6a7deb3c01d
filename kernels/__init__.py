"""The ops. Each takes and returns tensors; importing this package never touches a GPU."""

# ruff: noqa: E402  the imports below load torch
from kernels.commands import before_imports

before_imports()

import logging

from kernels.absmax import dequantize_absmax, quantize_absmax
from kernels.adamw import adamw
from kernels.adamw8bit import adamw8bit
from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.dora import dora_linear, dora_norm, weight_norm_sq
from kernels.experts import experts_dora, experts_linear, experts_lora, experts_norm
from kernels.joined import Joined, joined_linears
from kernels.lora import lora_linear
from kernels.nf4 import dequantize_4bit, quantize_4bit
from kernels.nf4_linear import nf4_linear
from kernels.op import has_kernel, use_backend
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotary
from kernels.routing import combine, gather, route
from kernels.swiglu import swiglu
from kernels.weight import QuantState, Weight

# bitsandbytes takes this folder for a PyPI package of its name, warns about `get_kernel`, and goes on without it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

quantize_nf4, dequantize_nf4 = quantize_4bit, dequantize_4bit

__all__ = [
    "add_rms_norm",
    "QuantState",
    "Weight",
    "quantize_4bit",
    "dequantize_4bit",
    "quantize_nf4",
    "dequantize_nf4",
    "quantize_absmax",
    "dequantize_absmax",
    "nf4_linear",
    "lora_linear",
    "dora_linear",
    "dora_norm",
    "weight_norm_sq",
    "Joined",
    "joined_linears",
    "experts_linear",
    "experts_lora",
    "experts_dora",
    "experts_norm",
    "route",
    "gather",
    "combine",
    "rms_norm",
    "swiglu",
    "rotary",
    "attention",
    "linear_cross_entropy",
    "adamw",
    "adamw8bit",
    "use_backend",
    "has_kernel",
]
