"""MLPs that compute so many tokens at a time, for long texts: `compute_mlps_in_parts`.

Of a part backward keeps the input alone, and computes the rest again. So the wide tensors inside an MLP are in memory
for one part, not for all tokens. Each part dequantizes packed weights again.

An MLP is a module of two or more linears, with or without adapters, whose results for a token depend on that token
alone. A probe shows that on small stand-ins. Experts that modules/mixtures.py knows are computed in parts too, and so
are the MLPs of layers that have their linears beside other things (chunked_layer.py). Llama 4's experts are not.
"""

import copy
import functools
import inspect
import math

import torch
from torch import Tensor, nn

from modules.adapters.bottleneck import BottleneckLinear
from modules.adapters.state import state_of
from modules.experts import is_experts
from modules.fused.chunked_layer import layer_in_parts
from modules.fused.mlp import FusedMLP
from modules.fused.module import Fused, can_be_replaced
from modules.linear import LoRALinear, NF4Linear, is_conv1d, weight_shape
from modules.mixtures import Experts, take_over_experts
from modules.parts import in_parts

LEAST = 4  # the narrowest side of a stand-in


class ChunkedMLP(Fused):
    """An MLP, `tokens` tokens at a time. Its code is that of the next class: the model's own, or FusedMLP.

    Args:
        mlp: to take the place of.
        random: the model's own code draws random numbers: dropout.
    """

    def __init__(self, mlp: nn.Module, tokens: int, random: bool = False):
        super().__init__(mlp)
        self.__dict__ |= {"own_class": getattr(mlp, "own_class", type(mlp)), "tokens": tokens, "random": random}

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return in_parts(super().forward, (x, *more), self.tokens, self.random)

    def __reduce__(self):  # pickle finds no class that was made here
        return _blank, (type(self).__bases__[1],), self.__dict__

    def own(self) -> nn.Module:
        own = super().own()
        del own.__dict__["tokens"], own.__dict__["random"]
        return own


def compute_mlps_in_parts(model: nn.Module, tokens: int) -> list[str]:
    """Have the MLPs of `model` compute `tokens` tokens at a time, in place. `unfuse` undoes it.

    Results and gradients are the same up to rounding. Dropout draws other masks than for all tokens at once, the same
    ones in backward. Names, parameters and state dicts stay what they are.

    Returns:
        The full names of these MLPs, or of the layers that they are a part of.
    """
    take_over_experts(model)
    state = state_of(model)
    adapted = {} if state is None else state.base
    replaced, chunked = [], {}  # by identity: a module may be there twice
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            module.tokens = tokens
            replaced.append(path)
    for prefix, parent in list(model.named_modules()):
        for name, module in list(parent._modules.items()):
            path = f"{prefix}.{name}" if prefix else name
            if module is None or path in adapted:
                continue
            if module not in chunked:
                chunked[module] = _chunked(module, tokens)
            if chunked[module] is not None:
                setattr(parent, name, chunked[module])
                replaced.append(path)
    return replaced


def _chunked(module: nn.Module, tokens: int) -> Fused | None:
    """The replacement of `module`; None if it is no MLP."""
    if isinstance(module, FusedMLP):
        return _kind(FusedMLP)(module, tokens)
    if isinstance(module, Fused) or not can_be_replaced(module) or module._parameters or module._buffers:
        return None
    if (layer := layer_in_parts(module, tokens)) is not None:
        return layer
    sizes = [_size(child) for child in module.children()]
    others = [child for child, size in zip(module.children(), sizes) if size is None]
    if len(sizes) - len(others) < 2 or any(True for child in others for _ in child.parameters()):
        return None
    random = _probe(module)
    return None if random is None else _kind(type(module))(module, tokens, random)


@functools.cache
def _kind(code: type[nn.Module]) -> type[ChunkedMLP]:
    return type(f"Chunked{code.__name__}", (ChunkedMLP, code), {})


def _blank(code: type[nn.Module]) -> ChunkedMLP:
    return _kind(code).__new__(_kind(code))


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear, whose adapter counts as the linear; None: it is no linear."""
    base = module.base if isinstance(module, LoRALinear | BottleneckLinear) else module
    is_linear = (isinstance(base, nn.Linear | NF4Linear) or is_conv1d(base)) and not is_experts(base)
    return weight_shape(base) if is_linear else None


@torch.no_grad()
def _probe(module: nn.Module) -> bool | None:
    """Whether the code of `module` draws random numbers in training; None: it is no MLP, or one token changes another.

    It is run on random stand-ins for its linears, as narrow as their ratios allow, so neither its weights nor its
    device matter.
    """
    sizes = {name: size for name, child in module.named_children() if (size := _size(child)) is not None}
    width = next(reversed(sizes.values()))[0]  # of the last linear's output, and so of the input
    unit = math.gcd(*(side for size in sizes.values() for side in size))
    times = -(-LEAST * unit // min(side for size in sizes.values() for side in size))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        stand_in = copy.copy(module)
        children = {name: copy.deepcopy(child) for name, child in module.named_children() if name not in sizes}
        for name, size in sizes.items():
            out, into = (side // unit * times for side in size)
            children[name] = nn.Linear(into, out, dtype=torch.float64)
        stand_in.__dict__ |= {"_modules": {name: children[name] for name in module._modules}}
        needed = [one for one in inspect.signature(module.forward).parameters.values() if one.default is one.empty]
        given = [torch.randn(2, 3, width // unit * times, dtype=torch.float64) for _ in needed]
        try:
            want = stand_in.eval()(*given)
            got = [stand_in(*part) for part in zip(*(x.flatten(0, -2).split(1) for x in given))]
            same = want.shape == given[0].shape and torch.allclose(torch.cat(got).view(want.shape), want)
            before = torch.get_rng_state()
            stand_in.train()(*given)
        except Exception:  # code of any module, given arguments that it may not know
            return None
        return not torch.equal(torch.get_rng_state(), before) if same else None
