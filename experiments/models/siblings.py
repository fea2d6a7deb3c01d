"""Adapted linears that read the same input, computed together on a CPU (kernels/shared_input.py).

A model calls them one after the other. The first call computes all of them, the others find their result.
"""

from types import MethodType

import torch
from torch import Tensor, nn

from kernels.base_weight import base_args
from kernels.shared_input import Linear, adapted_linears
from modules import DoRALinear, LoRALinear
from modules.linear import weight_of

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Group:
    """What the siblings `linears` share: the input of the last call, as it was and the adapters were then, and the
    results nobody has asked for yet."""

    def __init__(self, linears: list[LoRALinear]):
        self.linears = linears
        self.x: Tensor | None = None
        self.versions: list[int] = []
        self.results: dict[LoRALinear, Tensor] = {}

    def can(self, x: Tensor) -> bool:
        if not (x.is_cpu and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return False
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # checkpointing, which may break off
            return False
        return all(linear.training and linear.dropout == 0 and linear.output_bias is None for linear in self.linears)

    def of(self, linear: LoRALinear, x: Tensor) -> Tensor:
        versions = [x._version, *(tensor._version for one in self.linears for tensor in (one.lora_A, one.lora_B))]
        if self.x is not x or self.versions != versions or linear not in self.results:
            self.x, self.versions = x, versions
            self.results = dict(zip(self.linears, self._compute(x)))
        result = self.results.pop(linear)
        if not self.results:
            self.x = None
        return result

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        linears, adapters = [], []
        for linear in self.linears:
            dora = isinstance(linear, DoRALinear)
            weight = weight_of(linear.base)
            base = base_args(weight.values, weight.quant_state, x)
            linears.append(Linear(base, linear.scaling, linear.norm_sq if dora else None))
            adapters.append((*linear.factors(), linear.magnitude if dora else None))
        return adapted_linears(x, linears, adapters)


def _forward(self: LoRALinear, x: Tensor) -> Tensor:
    return self.siblings.of(self, x) if self.siblings.can(x) else type(self).forward(self, x)


def join(model: nn.Module) -> None:
    """Have the adapters of `model` that are siblings computed together while it trains on a CPU."""
    for module in model.modules():
        for names in SIBLINGS:
            linears = [getattr(module, name, None) for name in names]
            if all(type(linear) in (LoRALinear, DoRALinear) for linear in linears):
                group = _Group(linears)
                for linear in linears:
                    linear.siblings = group
                    linear.forward = MethodType(_forward, linear)
