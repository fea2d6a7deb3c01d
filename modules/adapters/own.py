"""Modules with parameters of their own in place of the base's: what `modules_to_save`, `bias` and BitFit train.

BitFit (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199) trains the biases and nothing else, those of norms
included. Of a model that has no biases, such as Llama, it cannot train any: there each decoder linear gets one that
starts at zero, so that the method is what the paper's models would have learned, y = xWᵀ + b with b alone trained.

An own copy of a module shares everything with it but the parameters named. Those are fp32, because small updates of
bf16 weights round to nothing; the module computes with them in the dtype its base has.
"""

import copy
from collections.abc import Iterable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modules.linear import NF4Linear, weight_shape


class _InDtype(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _shallow(module: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    for store in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[store] = dict(module.__dict__[store])
    if "forward" in vars(module):  # put on this one module, whose weights it would go on to use
        clone.forward = MethodType(module.forward.__func__, clone)
    return clone


def own_copy(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `module` whose tensors `names`, direct parameters or buffers, are its own; parameters train in fp32.

    A bias that a linear lacks starts at zero.
    """
    clone = _shallow(module)
    for name in names:
        tensor = _zero_bias(module) if getattr(module, name) is None else getattr(module, name).detach()
        if name in module._buffers:
            clone._buffers[name] = tensor.clone()
            continue
        clone._parameters[name] = nn.Parameter(tensor.to(torch.float32, copy=True))
        if tensor.dtype != torch.float32:
            parametrize.register_parametrization(clone, name, _InDtype(tensor.dtype), unsafe=True)
    return clone


def _zero_bias(linear: nn.Module) -> Tensor:
    dtype = linear.dtype if isinstance(linear, NF4Linear) else linear.weight.dtype
    return torch.zeros(weight_shape(linear)[0], dtype=dtype, device=linear.weight.device)


def own_tensor(clone: nn.Module, name: str) -> Tensor:
    """The tensor `name` that an own copy has of its own: what trains and what is saved."""
    return clone.parametrizations[name].original if parametrize.is_parametrized(clone, name) else getattr(clone, name)


def settled(base: nn.Module, clone: nn.Module, names: Iterable[str]) -> nn.Module:
    """A plain module that computes as `clone`, the own copy of `base`, does, frozen and in the base's dtype."""
    module = _shallow(base)
    for name in names:
        tensor = getattr(clone, name).detach().clone()
        if name in base._buffers:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return module
