"""A decoder layer that has the linears of its MLP beside other things, fc2(act(fc1(x))), and computes that in parts.

OPT, XGLM and BioGPT are such. The layer's own code runs on a copy of the layer whose fc1 and activation hand x on, and
whose fc2 computes all three. So nothing may happen between them: a dropout there, as XGLM and BioGPT may have, excludes
this. A probe on a small stand-in shows whether it does.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modules.fused.module import Fused
from modules.parts import in_parts

NAMES = ("fc1", "activation_fn", "fc2")
WIDTH = 8  # of a stand-in


class LayerInParts(Fused):
    """A layer whose MLP computes `tokens` tokens at a time. Its code is that of the next class, the model's own."""

    def __init__(self, layer: nn.Module, tokens: int):
        super().__init__(layer)
        self.__dict__["tokens"] = tokens

    def forward(self, *args, **kwargs):
        first, activation, second = (self._modules[name] for name in NAMES)

        def mlp(x: Tensor) -> Tensor:
            return second(activation(first(x)))

        layer = self.own()
        passed = {"fc1": nn.Identity(), "activation_fn": nn.Identity()}
        passed["fc2"] = _Calls(lambda x: in_parts(mlp, (x,), self.tokens))
        layer.__dict__["_modules"] = self._modules | passed
        return layer.forward(*args, **kwargs)

    def __reduce__(self):  # pickle finds no class that was made here
        return _blank, (self.own_class,), self.__dict__

    def own(self) -> nn.Module:
        own = super().own()
        del own.__dict__["tokens"]
        return own


class _Calls(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@functools.cache
def _kind(code: type[nn.Module]) -> type[LayerInParts]:
    return type(code.__name__, (LayerInParts, code), {})  # transformers knows layers by this name


def _blank(code: type[nn.Module]) -> LayerInParts:
    return _kind(code).__new__(_kind(code))


def layer_in_parts(layer: nn.Module, tokens: int) -> LayerInParts | None:
    """The replacement of `layer`; None if it is no such layer."""
    if not set(NAMES) <= layer._modules.keys() or not _is_such(layer):
        return None
    return _kind(type(layer))(layer, tokens)


@torch.no_grad()
def _is_such(layer: nn.Module) -> bool:
    """Whether a stand-in for `layer`, whose other children hand on what they get, has the same results in parts."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        stand_in = copy.copy(layer)
        children = {name: _Calls(_first) for name in layer._modules}
        children["activation_fn"] = copy.deepcopy(layer._modules["activation_fn"])
        children |= {"fc1": nn.Linear(WIDTH, 2 * WIDTH), "fc2": nn.Linear(2 * WIDTH, WIDTH)}
        children |= {name: nn.Identity() for name in layer._modules if name.endswith("norm")}
        stand_in.__dict__["_modules"] = children
        x = torch.randn(2, 3, WIDTH)
        try:
            for training in (True, False):
                results = []
                for one in (stand_in.train(training), _kind(type(layer))(stand_in, 1)):
                    torch.manual_seed(0)
                    results.append(one.forward(x))
                if not torch.allclose(*results, rtol=1e-4, atol=1e-6):
                    return False
        except Exception:  # code of any model, without the arguments that it may need
            return False
    return True


def _first(*args, hidden_states: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """As attention, which returns its weights, too."""
    return args[0] if args else hidden_states, None
