"""`torch.library` ops with little between a call and its implementation.

As `torch.library.custom_op` and its `register_autograd`, but a call passes through nothing except PyTorch's dispatcher
and one autograd.Function. On a CPU what those two add takes as long as a small model's linear does.
"""

from collections.abc import Callable, Iterable

import torch

_library = torch.library.Library("qdora", "FRAGMENT")


def define_op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable], Callable]:
    """Decorator: the function becomes the op qdora::`name`, on every device; its annotations are the schema."""

    def define(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return define


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the function makes the outputs of qdora::`name` without their values."""
    return torch.library.register_fake(f"qdora::{name}", lib=_library)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Make qdora::`name` differentiable. Arguments as those of `torch.library.register_autograd`."""
    op = getattr(torch.ops.qdora, name).default

    def call(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def forward(ctx, *args):
        output = call(*args)
        setup_context(ctx, args, output)
        return output

    function = type(name, (torch.autograd.Function,), {"forward": forward, "backward": backward})

    def run(*args):
        needed = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        return function.apply(*args) if needed else call(*args)

    _library.impl(name, run, "Autograd")
