"""A benchmark: an op, the others that compute it, sizes, the check of a result, the least cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Unavailable(Exception):
    """A provider cannot run here, for this reason."""


Inputs = Mapping[str, Any]
Result = dict[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """One op and everything it is compared with.

    Attributes:
        kernel: name of the op, on the command line and in the results.
        mode: "forward" or "forward+backward".
        unit: sizes count these: "weight", "row", "block" or "token".
        sizes, quick_sizes: the sizes to measure, and those for --quick.
        configs: everything else that varies: keyword arguments of `inputs` and `cost`. Each has a "dtype" of DTYPES.
        inputs: (size, device, **config) → the inputs of the providers.
        providers: by name, (inputs) → the function to time. The others are compared with "ours".
        check: (inputs) → a function of a result, which raises AssertionError with the reason if the result is wrong.
        cost: (size, **config) → (bytes, flops): every input read once, every output written once, nothing else moved.
        products: the op multiplies matrices. Then FLOPs count in the roofline, and dtypes whose products the machine
            only emulates are left out.
        gpu_only: the providers are GPU kernels, which a CPU does not run.
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
