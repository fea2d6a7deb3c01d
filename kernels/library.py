"""`torch.library` ops with little between a call and its implementation.

As `torch.library.custom_op` and its `register_autograd`, but a call passes through nothing except PyTorch's dispatcher
and one autograd.Function; and not through the dispatcher where nothing would hear of it there: no compiler, no mode, no
tensor subclass, no tensor without values. On a CPU what these add takes as long as a small model's linear does.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_library = torch.library.Library("qdora", "FRAGMENT")
_ops: dict[str, "Op"] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


class Op:
    """qdora::`name`, implemented by `function` on every device; differentiable if it was given an autograd.Function."""

    def __init__(self, name: str, function: Callable):
        self.dispatched = getattr(torch.ops.qdora, name).default
        self.function = function
        self.autograd: type[torch.autograd.Function] | None = None

    def __call__(self, *args):
        if not _unheard(args):
            return self.dispatched(*args)
        if self.autograd and _needs_grad(args):
            return self.autograd.apply(*args)
        with torch.no_grad():  # what PyTorch would differentiate of the function on its own is not the op's
            return self.function(*args)


def _unheard(args: tuple) -> bool:
    """True if dispatching a call with `args` would come to nothing but its implementation, or its autograd.Function."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for arg in args:
        if type(arg) in _PLAIN:
            if arg.is_meta:
                return False
        elif isinstance(arg, Tensor):
            return False
    return True


def _needs_grad(args: tuple) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def define_op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable], Op]:
    """Decorator: the function becomes the op qdora::`name`, on every device; its annotations are the schema."""

    def define(function: Callable) -> Op:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        _ops[name] = Op(name, function)
        return _ops[name]

    return define


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the function makes the outputs of qdora::`name` without their values."""
    return torch.library.register_fake(f"qdora::{name}", lib=_library)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Make qdora::`name` differentiable. Arguments as those of `torch.library.register_autograd`."""
    op = _ops[name]

    def call(*args):
        if _unheard(args):
            return op.function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.dispatched(*args)

    def forward(ctx, *args):
        output = call(*args)
        setup_context(ctx, args, output)
        return output

    op.autograd = type(name, (torch.autograd.Function,), {"forward": forward, "backward": backward})
    _library.impl(name, lambda *args: op.autograd.apply(*args) if _needs_grad(args) else call(*args), "Autograd")
