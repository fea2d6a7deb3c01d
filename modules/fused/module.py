"""A module in place of a model's own, and the probe that shows that both compute the same."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import use_backend

PROBED = (torch.float32, torch.bfloat16)  # the second shows where a module rounds


class Fused(nn.Module):
    """A module that gives the results of `own` by other code.

    It has all the attributes of `own`. Parameters, buffers, children and hooks are in the very same dictionaries, so
    that a change to one module is a change to both.
    """

    def __init__(self, own: nn.Module):  # nn.Module's own __init__ would make new dictionaries
        self.__dict__.update(vars(own))
        self.__dict__["own_class"] = type(own)

    def own_forward(self, *args):
        """The results of the own module's code."""
        return self.own_class.forward(self, *args)

    def own(self) -> nn.Module:
        """The module that this one took the place of, as it would be now."""
        own = self.own_class.__new__(self.own_class)
        own.__dict__.update(vars(self))
        del own.__dict__["own_class"]
        return own

    def extra_repr(self) -> str:
        return self.own_class.extra_repr(self)


def can_be_replaced(module: nn.Module) -> bool:
    """False if another library has put a forward of its own on this one module."""
    return "forward" not in vars(module)


@torch.no_grad()
def computes_the_same(kind: type[Fused], own: nn.Module, parts: Callable[[torch.dtype], tuple[dict, dict, Tensor]]):
    """True if a `kind` in place of `own` gives its results, within a rounding to their dtype.

    Both are run on small random stand-ins for the module's parts, so neither its weights nor its device matter.

    Args:
        parts: gives parameters and children by name, in a dtype, and an input that fits them.
    """
    for dtype in PROBED:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            parameters, children, x = parts(dtype)
        stand_in = copy.copy(own)
        stand_in.__dict__ |= {"_parameters": parameters, "_modules": {**own._modules, **children}, "training": True}
        ours = kind(stand_in)
        try:
            with use_backend("reference"):
                wants, got = (stand_in.forward(x), ours.own_forward(x)), ours.forward(x)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # the module takes or does something else
            return False
        for want in wants:
            if not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
                return False
            if not (want - got).abs().max() <= torch.finfo(dtype).eps * want.abs().max():
                return False
    return True
