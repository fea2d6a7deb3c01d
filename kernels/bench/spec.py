"""What a benchmark states: an op, who else computes it, at which sizes, what a right result is, what it must cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Unavailable(Exception):
    """Raised by a provider that cannot run here, saying why."""


Inputs = Mapping[str, Any]
Result = dict[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """One op and everything it is compared with.

    Attributes:
        kernel: name of the op, on the command line and in the results.
        mode: "forward" or "forward+backward".
        unit: what a size counts: "weight" or "token".
        sizes, quick_sizes: the sizes to measure, and those for --quick.
        configs: all else that varies: keyword arguments of `inputs` and `cost`. Each has a "dtype" of DTYPES.
        inputs: (size, device, **config) → what the providers compute from.
        providers: by name, (inputs) → the function to time. "ours" is the one the others are compared with.
        check: (inputs) → a function that raises AssertionError, saying why, if a provider's result is wrong.
        cost: (size, **config) → (bytes, flops): every input read once, every output written once, nothing else moved.
        products: it multiplies matrices. Then FLOPs count in the roofline, and dtypes whose products the machine only
            emulates are left out.
        gpu_only: it compares GPU kernels, which a CPU does not run.
    """

    kernel: str
    mode: str
    unit: str
    sizes: tuple[int, ...]
    quick_sizes: tuple[int, ...]
    configs: tuple[Mapping[str, Any], ...]
    inputs: Callable[..., Inputs]
    providers: Mapping[str, Callable[[Inputs], Callable[[], Result]]]
    check: Callable[[Inputs], Callable[[Result], None]]
    cost: Callable[..., tuple[int, int]]
    products: bool = False
    gpu_only: bool = False


def randn(*shape: int, seed: int) -> Tensor:
    """fp32 on the CPU, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
