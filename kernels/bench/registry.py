"""Every benchmark by its op's name. Their files are imported when they are asked for: names need no torch."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.bench.spec import Bench

OPS = {  # by file of this folder: the ops of its BENCHES
    "nf4": ("nf4_quantize", "nf4_dequantize"),
    "absmax": ("absmax_quantize", "absmax_dequantize"),
    "products": ("nf4_linear", "gemm", "project", "outer"),
    "dora_norm": ("dora_norm",),
    "linears": ("lora_linear", "dora_linear"),
    "experts": ("experts_lora", "experts_dora"),
    "blocks": ("rms_norm", "swiglu", "rotary", "linear_cross_entropy"),
    "optimizers": ("adamw", "adamw8bit"),
}
NAMES = [name for names in OPS.values() for name in names]


def benches() -> "dict[str, Bench]":
    found = [bench for file in OPS for bench in importlib.import_module(f"kernels.bench.{file}").BENCHES]
    return {bench.kernel: bench for bench in found}
