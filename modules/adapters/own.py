"""Own copies of modules: the parameters that `modules_to_save`, `bias` and BitFit train in place of the base's.

An own copy shares everything with the base's module except the tensors named. Its own parameters are fp32, because
small updates of bf16 weights round to zero. The module computes with them in the base's dtype.

BitFit (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199) trains all biases, those of norms included, and nothing
else. A model such as Llama has no biases. There each decoder linear gets a bias b that starts at zero: y = xWᵀ + b, as
in the paper's models, and b alone trains.
"""

import copy
from collections.abc import Iterable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modules.linear import weight_of, weight_shape


class _InDtype(nn.Module):
    """A parametrization: computes with an fp32 parameter in `dtype`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _shallow(module: nn.Module) -> nn.Module:
    """A copy of `module` with the same tensors and children, in dicts of its own."""
    clone = copy.copy(module)
    for store in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[store] = dict(module.__dict__[store])
    if "forward" in vars(module):  # a forward set on the instance; it must use the copy's weights
        clone.forward = MethodType(module.forward.__func__, clone)
    return clone


def own_copy(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `module` that has its own tensors `names` and shares the others. Its own parameters train in fp32.

    Args:
        names: of parameters or buffers of the module itself, not of its children. `bias` may be None in a linear: the
            copy's bias then starts at zero.
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
    return torch.zeros(weight_shape(linear)[0], dtype=weight_of(linear).dtype, device=linear.weight.device)


def own_tensor(clone: nn.Module, name: str) -> Tensor:
    """The tensor `name` of an own copy as it trains and is saved: a parameter is fp32."""
    return clone.parametrizations[name].original if parametrize.is_parametrized(clone, name) else getattr(clone, name)


def merged_copy(base: nn.Module, clone: nn.Module, names: Iterable[str]) -> nn.Module:
    """A plain frozen module, in the base's dtype, that computes the same as `clone`, the own copy of `base`.

    Args:
        names: of the tensors that `clone` does not share with `base`.
    """
    module = _shallow(base)
    for name in names:
        tensor = getattr(clone, name).detach().clone()
        if name in base._buffers:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return module
