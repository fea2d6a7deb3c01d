"""How an op is defined.

An op is a function of tensors, weights and numbers. Its file, kernels/<file>.py, states its schema and the shapes of
its results (`define_op`) and its gradients (`Op.differentiate`). Up to three files of the same name compute it:

    kernels/reference/<file>.py     plain torch: the definition, and the oracle of its tests
    kernels/triton/<file>.py        Triton kernels, for CUDA tensors
    kernels/cpu/<file>.py           kernels for CPUs

each with a function of the op's name and arguments. A missing function is a missing cell of the grid. columns.py
chooses the cell that runs. gradients.py connects an op to autograd.

Each op is a `torch.library` op, qdora::<name>: it works under torch.compile, on the meta device and in graph capture. A
call skips PyTorch's dispatcher where the dispatcher would do nothing: no compiler, no mode, no tensor subclass, no meta
tensor. On a CPU the dispatcher takes as long as a small model's linear does.
"""

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from kernels import weight
from kernels.columns import Row, first_tensor, has_kernel, interpreting, supports_if, use_backend
from kernels.gradients import Function, Layout, flattened, grouped
from kernels.weight import Weight

__all__ = ["Op", "define_op", "has_kernel", "interpreting", "supports_if", "use_backend"]

_PLAIN = (Tensor, torch.nn.Parameter)
_library = torch.library.Library("qdora", "FRAGMENT")


class Op(Row):
    """qdora::`name`. Called with the arguments of its fake, positionally.

    Args:
        fake: makes the results without their values. Its signature is the op's, its file the op's.
        mutates: names of the arguments that the op changes.
        products: the Triton kernels multiply matrices.
    """

    def __init__(self, fake: Callable, mutates: Iterable[str], products: bool):
        super().__init__(fake.__name__.removeprefix("_"), fake.__module__.removeprefix("kernels."), products)
        self.fake = fake
        signature = inspect.signature(fake)
        self.parameters = tuple(signature.parameters)
        self.inputs = namedtuple(self.name, self.parameters)  # a value for each argument, by its name
        self._weights = [i for i, p in enumerate(signature.parameters.values()) if p.annotation is Weight]
        self._weight_lists = [i for i, p in enumerate(signature.parameters.values()) if p.annotation == list[Weight]]
        self._function: type[torch.autograd.Function] | None = None
        annotations = [p.annotation for p in signature.parameters.values()]
        self._has_lists = any(get_origin(annotation) is list for annotation in annotations)
        self.returns_lists = any(get_origin(part) is list for part in get_args(signature.return_annotation))
        schema = torch.library.infer_schema(_flat_prototype(signature), mutates_args=mutates)
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, lambda *flat: self._run(*self.unflatten(flat)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"qdora::{self.name}", lambda *flat: fake(*self.unflatten(flat)), lib=_library)
        self.dispatched = getattr(torch.ops.qdora, self.name).default

    def __call__(self, *args):
        if not _can_skip_dispatcher(args):
            return self.dispatched(*self.flatten(args))
        if self._function is not None and self._needs_grad(args):
            return self._differentiable(self._run, args)
        if not torch.is_grad_enabled():
            return self._run(*args)
        with torch.no_grad():  # the op's gradients are its own, not those of the operations inside
            return self._run(*args)

    def _run(self, *args):
        if torch._C._is_any_autocast_enabled():  # it would cast some of the operations inside, and not the others
            with torch.autocast(first_tensor(args).device.type, enabled=False):
                return self.cell(self.column(*args))(*args)
        return self.cell(self.column(*args))(*args)

    # The dispatcher takes flat arguments: a Weight is a list of tensors and a string (weight.py), a list of weights
    # is one list of all their tensors and one string.

    def flatten(self, args: tuple) -> list:
        """The arguments as the dispatcher takes them."""
        flat = []
        for i, arg in enumerate(args):
            if i in self._weights:
                flat += weight.flatten(arg)
            elif i in self._weight_lists:
                parts = [weight.flatten(one) for one in arg]
                flat += [tensor for tensors, _ in parts for tensor in tensors], "; ".join(text for _, text in parts)
            else:
                flat.append(arg)
        return flat

    def unflatten(self, flat: tuple) -> list:
        """The arguments that `flatten` was given."""
        if not (self._weights or self._weight_lists):
            return flat
        left, args = iter(flat), []
        for i in range(len(self.parameters)):
            arg = next(left)
            if i in self._weights:
                arg = weight.unflatten(arg, next(left))
            elif i in self._weight_lists:
                arg = _unflatten_list(arg, next(left))
            args.append(arg)
        return args

    # ------------------------------------------------------------------------------- gradients

    def differentiate(
        self, keep: Callable[..., dict[str, Any]], backward: Callable[..., dict[str, Any]], results: int = 1
    ) -> None:
        """Make the op differentiable.

        Args:
            keep: called as keep(inputs, results), inputs by name; returns by name what backward needs.
            backward: called as backward(kept, needs, *gradients of the results); `kept` has what `keep` returned,
                `needs` says by the name of an input whether its gradient is asked for. Returns gradients by the name
                of the input; a missing one is None. The gradient of a list of tensors is a list.
            results: the first `results` results have gradients. The others have none. A result may be a list of
                tensors.
        """
        self.keep, self.backward, self.differentiable = keep, backward, results
        self._function = type(self.name, (Function,), {"op": self})
        _library.impl(self.name, self._autograd_key, "Autograd")

    def _autograd_key(self, *flat):
        args = self.unflatten(flat)
        if self._needs_grad(args):
            return self._differentiable(self._below_autograd, args)
        return self._below_autograd(*args)

    def _below_autograd(self, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return self.dispatched(*self.flatten(args))

    def _differentiable(self, compute: Callable, args: tuple):
        """The results of `compute` on `args`, with the op's gradient."""
        if self._weight_trains(args):
            raise RuntimeError(f"{self.name} gives no gradient for its weight: freeze it with requires_grad_(False)")
        layout = Layout(compute)
        if self._has_lists:
            layout.arguments = [len(arg) if type(arg) is list else None for arg in args]
            args = flattened(args)
        results = self._function.apply(layout, *args)
        return grouped(layout.results, results)

    def _needs_grad(self, args: tuple) -> bool:
        return torch.is_grad_enabled() and (torch._C._any_requires_grad(*args) or self._weight_trains(args))

    def _weight_trains(self, args: tuple) -> bool:
        for i in self._weights:
            if args[i].values.requires_grad:
                return True
        for i in self._weight_lists:
            for one in args[i]:
                if one.values.requires_grad:
                    return True
        return False


def _can_skip_dispatcher(args: tuple) -> bool:
    """True if nothing would come between a call and the implementation, or the autograd.Function, of the op."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for arg in args:
        if type(arg) is list and arg:
            arg = arg[0]  # the tensors of a list are of one kind
        if type(arg) is Weight:
            arg = arg.values
        if type(arg) in _PLAIN:
            if arg.is_meta:
                return False
        elif isinstance(arg, Tensor):
            return False
    return True


def _flat_prototype(signature: inspect.Signature) -> Callable:
    """A function whose signature is the one that the dispatcher sees."""
    parameters = []
    for p in signature.parameters.values():
        if p.annotation in (Weight, list[Weight]):
            parameters.append(p.replace(annotation=list[Tensor]))
            p = inspect.Parameter(f"{p.name}_format", p.kind, annotation=str)
        parameters.append(p)

    def prototype():
        pass

    prototype.__signature__ = signature.replace(parameters=parameters)
    return prototype


def _unflatten_list(tensors: list[Tensor], texts: str) -> list[Weight]:
    weights, left = [], list(tensors)
    for text in texts.split("; "):
        count = weight.tensor_count(text)
        weights.append(weight.unflatten(left[:count], text))
        del left[:count]
    return weights


def define_op(fake: Callable | None = None, *, mutates: Iterable[str] = (), products: bool = False):
    """Decorator: the function becomes the op of its name (without a leading underscore).

    Its annotations are the op's schema; Weight, list[Weight] and the types of `torch.library.infer_schema` can be had.
    Its body makes the results of the op without their values. `mutates` and `products`: see `Op`.
    """
    if fake is None:
        return functools.partial(define_op, mutates=mutates, products=products)
    return Op(fake, mutates, products)
