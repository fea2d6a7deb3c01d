"""A benchmark: an op, the others that compute it, sizes, the check of a result, the least cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OF_MODELS = ((4096, 4096), (14336, 4096), (28672, 8192))  # (out, in) of linears of Llama-3 8B and 70B
RANKS = (16, 64)


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
        weights: by provider, (inputs) → the bytes of its frozen weights, where memory is printed beside time.
        products: the op multiplies matrices. Then FLOPs count in the roofline, and dtypes whose products the machine
            only emulates are left out.
        gpu_only: the providers are GPU kernels, which a CPU does not run.
        sizes_of_models, configs_of_models: in place of sizes and configs, as real models have them: on a GPU, and where
            they are asked for; empty: the same.
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
    weights: Mapping[str, Callable[[Inputs], int]] = field(default_factory=dict)
    products: bool = False
    gpu_only: bool = False
    sizes_of_models: tuple[int, ...] = ()
    configs_of_models: tuple[Mapping[str, Any], ...] = ()

    def of_models(self) -> "Bench":
        """The benchmark with the sizes and configs of real models."""
        return replace(self, sizes=self.sizes_of_models or self.sizes, configs=self.configs_of_models or self.configs)


def randn(*shape: int, seed: int) -> Tensor:
    """fp32 on the CPU, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
