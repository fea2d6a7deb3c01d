"""The torch.autograd.Function of an op: it saves tensors, groups flat arguments and finds gradients by name."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from torch import Tensor


class Layout:
    """torch's autograd.Function does not look into lists, so arguments and results are passed flat. This records how to
    group them again.

    Attributes:
        compute: gives the results.
        arguments: the length of each list, None for another argument. It stays None if no argument is a list.
        results: the length of each list, None for a tensor. Forward sets it. It stays None if the op returns one
            tensor.
    """

    __slots__ = ("arguments", "compute", "results")

    def __init__(self, compute: Callable):
        self.compute = compute
        self.arguments: list[int | None] | None = None
        self.results: list[int | None] | None = None


class Function(torch.autograd.Function):
    """Each op with a gradient has a subclass of this, whose `op` it is."""

    @classmethod
    def forward(cls, ctx, layout: Layout, *args):
        op, args = cls.op, grouped(layout.arguments, args)
        results = layout.compute(*args)
        names, lists, others, tensors = [], {}, {}, []
        for name, value in op.keep(op.inputs(*args), results).items():
            if isinstance(value, Tensor):
                names.append(name)
                tensors.append(value)
            elif type(value) is list:
                lists[name] = value
            else:
                others[name] = value
        for value in lists.values():
            tensors += value
        ctx.kept = layout, names, {name: len(value) for name, value in lists.items()} if lists else None, others
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # or zeros are made for the results that have no gradient
        if isinstance(results, Tensor):
            return results
        differentiable = op.differentiable
        if op.returns_lists:
            layout.results = [len(result) if type(result) is list else None for result in results]
            differentiable = sum(1 if size is None else size for size in layout.results[:differentiable])
            results = tuple(flattened(results))
        ctx.mark_non_differentiable(*results[differentiable:])
        return results

    @classmethod
    def backward(cls, ctx, *gradients):
        for gradient in gradients:
            if gradient is not None:
                break
        else:
            return (None,) * len(ctx.needs_input_grad)
        op, (layout, names, lists, others), tensors = cls.op, ctx.kept, ctx.saved_tensors
        kept = others.copy()
        kept.update(zip(names, tensors))
        if lists is not None:
            kept.update(zip(lists, grouped(list(lists.values()), tensors[len(names) :])))
        asked = ctx.needs_input_grad[1:]
        if layout.arguments is not None:
            asked = [any(one) if type(one) is list else one for one in grouped(layout.arguments, asked)]
        found = op.backward(SimpleNamespace(**kept), op.inputs(*asked), *grouped(layout.results, gradients))
        given = [found.get(name) for name in op.parameters]
        if layout.arguments is not None:
            given = flattened([g or [None] * n if n is not None else g for g, n in zip(given, layout.arguments)])
        return None, *given


def flattened(args: Iterable) -> list:
    flat = []
    for arg in args:
        if type(arg) is list:
            flat += arg
        else:
            flat.append(arg)
    return flat


def grouped(sizes: list[int | None] | None, flat):
    """The inverse of `flattened`; without sizes `flat` itself."""
    if sizes is None:
        return flat
    left = iter(flat)
    return tuple(next(left) if size is None else [next(left) for _ in range(size)] for size in sizes)
