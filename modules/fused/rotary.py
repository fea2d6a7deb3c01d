"""A model's rotary position embedding by the op rotary.

transformers' attention calls a function of its own file. No module holds that function, so no module can replace it. We
replace the function in that file. This affects every model of the kind in this process. Both functions give the same
bits. `release` of the last fused model of a kind puts the function back.
"""

import sys
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn

import kernels

NAME = "apply_rotary_pos_emb"
_fused: dict[str, WeakSet] = {}  # names of Python modules that have our function, and the fused models that call it


def use(model: nn.Module) -> None:
    """Have `model`, and others of its kind, rotate queries and keys here, if that gives the same bits."""
    for name in {type(module).__module__ for module in model.modules()}:
        own = getattr(sys.modules[name], NAME, None)
        if own is not None and name not in _fused and _gives_the_same_bits(own):
            setattr(sys.modules[name], NAME, _ours_or_own(own))
            _fused[name] = WeakSet()
        if name in _fused:
            _fused[name].add(model)


def release(model: nn.Module) -> None:
    """Undo `use`."""
    for name, models in list(_fused.items()):
        models.discard(model)
        if not models:
            setattr(sys.modules[name], NAME, getattr(sys.modules[name], NAME).own)
            del _fused[name]


def _ours_or_own(own: Callable) -> Callable:
    # as models call it: Qwen4's indexer turns queries alone, and gives angles by name
    def rotary(q: Tensor, k: Tensor | None = None, cos: Tensor = None, sin: Tensor = None, *args, **kwargs):
        # models that turn a part of each head give narrower angles
        fits = (
            k is not None and q.dim() == k.dim() == 4 and cos.dim() == 3 and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        )
        fits = fits and cos.shape[-1] % 2 == 0 and q.dtype == k.dtype == cos.dtype
        ours = fits and not torch.compiler.is_compiling()
        return (kernels.rotary if ours else own)(q, k, cos, sin, *args, **kwargs)

    rotary.own = own
    return rotary


def _gives_the_same_bits(own: Callable) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(size, generator=generator, device="cpu")
        for size in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    )
    try:
        with kernels.use_backend("reference"):
            return all(map(torch.equal, own(q, k, cos, sin), kernels.rotary(q, k, cos, sin)))
    except (TypeError, ValueError, RuntimeError):  # the function takes or does something else
        return False
