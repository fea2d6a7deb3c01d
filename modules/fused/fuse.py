"""Put the fused modules into a model, and take them out."""

from torch import nn

from modules.adapters.state import state_of
from modules.fused import attention, rotary
from modules.fused.joined import join
from modules.fused.mlp import fused_mlp
from modules.fused.module import Fused
from modules.fused.rms_norm import fused_rms_norm
from modules.linear import LoRALinear
from modules.mixtures import Experts


def fuse(model: nn.Module) -> list[str]:
    """Have `model` compute norms, gated MLPs, rotary embedding and attention with the ops of kernels/, in place.

    The model may be on any device, packed or not, with adapters or without. A part is replaced only if its replacement
    computes the same. A module that an adapter has replaced stays as it is.

    Adapted linears that read one input are computed together. Those of an attention need another call of `fuse` after
    `attach`, `load_adapter` or `set_adapter` has put them into the model; until then they are computed one by one.

    Returns:
        The full names of the modules that were replaced.
    """
    attention.use(model)
    rotary.use(model)
    state = state_of(model)
    adapted = {} if state is None else state.base
    replaced, fused = [], {}  # by identity: a module may be there twice
    for prefix, parent in list(model.named_modules()):
        for name, own in list(parent._modules.items()):
            path = f"{prefix}.{name}" if prefix else name
            if own is None or path in adapted:
                continue
            if own not in fused:
                fused[own] = fused_rms_norm(own) or fused_mlp(own)
            if fused[own] is not None:
                setattr(parent, name, fused[own])
                replaced.append(path)
    join(model)
    return replaced


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: give the model its own code back, in place.

    Raises:
        ValueError: an adapter trains a copy of a fused module; the model is unchanged.
    """
    state = state_of(model)
    for path, base in {} if state is None else state.base.items():
        if isinstance(base, Fused):
            raise ValueError(f"an adapter trains {path}, which is fused: detach the adapter before unfuse")
    for module in model.modules():
        if isinstance(module, Experts):
            module.tokens = None
    own = {module: module.own() for module in model.modules() if isinstance(module, Fused)}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in own:
                setattr(parent, name, own[child])
    adapters = [] if state is None else [module for one in state.named.values() for module in one.modules.values()]
    for linear in (*model.modules(), *adapters):
        if isinstance(linear, LoRALinear):
            linear.group = None
    attention.release(model)
    rotary.release(model)
