"""Adapted linears that read one input, by the op joined_linears.

An MLP calls the op itself (mlp.py). An attention's forward is the model's own code, which calls its projections one
after the other: there the first call computes all of them, and the others find their result.

Under checkpointing a block runs twice, and must keep the same tensors both times. So a projection finds a result only
if it was computed inside the same region: that of the other time, or of another region, does not count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kernels
from modules.linear import DoRALinear, LoRALinear, under_autocast, weight_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def joined(linears: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
    """The results of `linears`, which all read x; None if they have to be called one by one."""
    return _compute(linears, x) if _can_join(linears, x) else None


def _can_join(linears: Sequence[nn.Module], x: Tensor) -> bool:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or under_autocast(x):
        return False
    for linear in linears:
        if type(linear) not in (LoRALinear, DoRALinear) or not linear.training or linear.dropout:
            return False
        if getattr(linear, "copies_result", False):
            return False
        if linear.output_bias is not None or linear._forward_hooks or linear._forward_pre_hooks:
            return False
    return kernels.has_kernel("joined_linears", x)


def _compute(linears: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
    parts = []
    for linear in linears:
        weight, of_dora = weight_of(linear.base), ()
        if isinstance(linear, DoRALinear):
            of_dora = linear.magnitude, linear.norm_sq, linear.known_norm(weight)
        parts.append(kernels.Joined(weight, *linear.factors(), linear.scaling, *of_dora))
    return kernels.joined_linears(x, parts)


class Group:
    """The projections of one attention. It keeps results that were computed together until each is asked for.

    Args:
        attention: the module whose children they are.
    """

    def __init__(self, attention: nn.Module):
        self.attention = attention
        self.x: Tensor | None = None  # of the last call
        self.seen: list = []  # in that call: who keeps tensors for backward, the versions of x and of the adapters
        self.results: dict[LoRALinear, Tensor] = {}

    def result(self, linear: LoRALinear, x: Tensor) -> Tensor | None:
        """The result of `linear`, one of the projections; None if it has to be computed alone."""
        linears = [getattr(self.attention, name) for name in PROJECTIONS]
        if not _can_join(linears, x) or any(one.group is not self for one in linears):
            return None
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # a checkpointed region has its own
        seen = [hooks, x._version, *(tensor._version for one in linears for tensor in (one.lora_A, one.lora_B))]
        if self.x is not x or self.seen != seen or linear not in self.results:
            self.forget()  # checkpointing breaks off inside the op once it has all that backward needs
            results = _compute(linears, x)
            self.x, self.seen, self.results = x, seen, dict(zip(linears, results))
        result = self.results.pop(linear)
        if not self.results:
            self.forget()
        return result

    def forget(self) -> None:
        self.x, self.seen, self.results = None, [], {}


def join(model: nn.Module) -> None:
    """Give the adapted projections of each attention in `model` their group."""
    for module in model.modules():
        linears = [getattr(module, name, None) for name in PROJECTIONS]
        if all(isinstance(linear, LoRALinear) for linear in linears):
            group = Group(module)
            for linear in linears:
                linear.group = group
