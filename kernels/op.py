"""How an op is defined, and which column of the grid runs it.

An op is a function of tensors, weights and numbers. Its file, kernels/<file>.py, states its schema and the shapes of
its results (`define_op`) and its gradients (`Op.differentiate`). Up to three files of the same name compute it:

    kernels/reference/<file>.py     plain torch: the definition, and the oracle of its tests
    kernels/triton/<file>.py        Triton kernels, for CUDA tensors
    kernels/cpu/<file>.py           kernels for CPUs

each with a function of the op's name and arguments. A missing function is a missing cell of the grid. CUDA tensors run
the Triton cell, CPU tensors the cpu cell; where it is missing, or does not support the tensors (`supports_if`), and on
all other devices, the reference runs. For GPUs before sm_80 Triton 3.7 has no matrix instructions: there ops with
matrix products run the reference, and a warning says so. `QDORA_BACKEND=reference|triton|cpu` in the environment, read
once, or `use_backend(...)` chooses the column for all ops (`torch` is an alias of `reference`). The cpu column that was
asked for also runs on meta tensors: they go through all its steps and have no values. With `TRITON_INTERPRET=1` in the
environment before triton is imported, the Triton column also runs on CPU tensors, in Triton's interpreter: slow, for
proofs only.

Each op is a `torch.library` op, qdora::<name>: it works under torch.compile, on the meta device and in graph capture. A
call skips PyTorch's dispatcher where the dispatcher would do nothing: no compiler, no mode, no tensor subclass, no meta
tensor. On a CPU the dispatcher takes as long as a small model's linear does.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from kernels import weight
from kernels.weight import Weight

BACKENDS = ("reference", "triton", "cpu")
_ALIASES = {"torch": "reference"}
_PLAIN = (Tensor, torch.nn.Parameter)
_library = torch.library.Library("qdora", "FRAGMENT")
_ops: dict[str, "Op"] = {}
_override: ContextVar[str | None] = ContextVar("qdora_backend", default=None)


# ------------------------------------------------------------------------------ which column runs


def interpreting() -> bool:
    """True if `@triton.jit` functions run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _checked(name: str, source: str) -> str:
    name = _ALIASES.get(name, name)
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on backend `name`: "reference" ("torch" means the same), "triton" or "cpu".

    An op that has no cell there, or whose cell does not support the tensors, runs its reference and warns once.

    Raises:
        ValueError: unknown name.
    """
    token = _override.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache  # reading the environment takes as long as a small tensor's sum
def _environment() -> str | None:
    env = os.environ.get("QDORA_BACKEND")
    return _checked(env, "QDORA_BACKEND") if env else None


@functools.cache
def _has_matrix_instructions(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, Triton has matrix instructions from sm_80 on: "
            "adapted linears and the DoRA norm run in torch; QDORA_BACKEND=triton runs their kernels all the same",
            stacklevel=2,
        )
    return major >= 8


@functools.cache
def _warn_of_reference(name: str, backend: str) -> None:
    warnings.warn(f"backend {backend!r} was asked for, but {name} has no kernel there for these tensors: "
                  "it runs in plain torch", stacklevel=2)  # fmt: skip


def has_kernel(name: str, x: Tensor) -> bool:
    """True if a kernel, and not plain torch, computes the op `name` of tensors like x: of its device and dtype."""
    if torch.compiler.is_compiling():
        return _has_kernel_while_compiling(name, x.device, x.dtype)
    return _ops[name].choose((x,)) != "reference"


@torch.compiler.assume_constant_result  # torch.compile cannot look into a ContextVar
def _has_kernel_while_compiling(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    return _ops[name].choose((torch.empty(0, device=device, dtype=dtype),)) != "reference"


def supports_if(condition: Callable[..., bool]) -> Callable[[Callable], Callable]:
    """Decorator of a cell: it computes the op only of arguments for which `condition` is true. Else it does of all."""

    def mark(function: Callable) -> Callable:
        function.supports = condition
        return function

    return mark


# ----------------------------------------------------------------------------------------- the op


class Op:
    """qdora::`name`. Called with the arguments of its fake, positionally.

    Args:
        fake: makes the results without their values. Its signature is the op's, its file the op's.
        mutates: names of the arguments that the op changes.
        products: the Triton kernels multiply matrices.
    """

    def __init__(self, fake: Callable, mutates: Iterable[str], products: bool):
        self.name = fake.__name__.removeprefix("_")
        self.file = fake.__module__.removeprefix("kernels.")
        self.fake, self.products = fake, products
        signature = inspect.signature(fake)
        self.parameters = tuple(signature.parameters)
        self.inputs = namedtuple(self.name, self.parameters)  # a value for each argument, by its name
        self._weights = [i for i, p in enumerate(signature.parameters.values()) if p.annotation is Weight]
        self._weight_lists = [i for i, p in enumerate(signature.parameters.values()) if p.annotation == list[Weight]]
        self._function: type[torch.autograd.Function] | None = None
        annotations = [p.annotation for p in signature.parameters.values()]
        self._has_lists = any(get_origin(annotation) is list for annotation in annotations)
        self.returns_lists = any(get_origin(part) is list for part in get_args(signature.return_annotation))
        self._cells: dict[str, Callable | None] = {}
        _ops[self.name] = self
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

    def cell(self, column: str) -> Callable | None:
        """The function in kernels/<column>/ that computes the op, None if there is none."""
        if column not in self._cells:  # imported now: a column that is not used costs no time
            self._cells[column] = find_function(column, self.file, self.name)
        return self._cells[column]

    def column(self, *args) -> str:
        """The column that runs the op for these arguments. Warns once if another one was asked for.

        Raises:
            RuntimeError: a column was asked for on tensors that it cannot run on.
        """
        column = self.choose(args)
        if column == "reference":
            asked = _override.get() or _environment()
            # on meta nothing is computed anyway
            if asked not in (None, column) and not _first_tensor(args).is_meta:
                _warn_of_reference(self.name, asked)
        return column

    def choose(self, args: tuple) -> str:
        """`column`, without the warning."""
        tensor, column = _first_tensor(args), _override.get() or _environment()
        if column is None:
            on_gpu = tensor.is_cuda and (not self.products or _has_matrix_instructions(tensor.device))
            column = "cpu" if tensor.is_cpu else "triton" if on_gpu else "reference"
        elif column == "triton" and not (tensor.is_cuda or interpreting()):
            raise RuntimeError(
                f"backend 'triton' was asked for on a {tensor.device.type} tensor: move it to a GPU, "
                "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
            )
        elif column == "cpu" and not (tensor.is_cpu or tensor.is_meta):
            raise RuntimeError(f"backend 'cpu' was asked for on a {tensor.device.type} tensor: move it to the CPU")
        cell = self.cell(column)
        return "reference" if cell is None or not cell.supports(*args) else column

    def _run(self, *args):
        if torch._C._is_any_autocast_enabled():  # it would cast some of the operations inside, and not the others
            with torch.autocast(_first_tensor(args).device.type, enabled=False):
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
            results: of several results, so many from the first on have gradients. A result may be a list of tensors.
        """
        self.keep, self.backward, self.differentiable = keep, backward, results
        self._function = type(self.name, (_Function,), {"op": self})
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
        layout = _Layout(compute)
        if self._has_lists:
            layout.arguments = [len(arg) if type(arg) is list else None for arg in args]
            args = _flat(args)
        results = self._function.apply(layout, *args)
        return _grouped(layout.results, results)

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


class _Layout:
    """How the flat arguments and results of an autograd.Function, which does not look into lists, are to be read.

    Attributes:
        compute: gives the results.
        arguments: the length of each argument that is a list, None for the others; None if there is no list.
        results: the same of the results, which the forward pass fills in; None if there is one and it is a tensor.
    """

    __slots__ = ("arguments", "compute", "results")

    def __init__(self, compute: Callable):
        self.compute = compute
        self.arguments: list[int | None] | None = None
        self.results: list[int | None] | None = None


class _Function(torch.autograd.Function):
    op: Op

    @classmethod
    def forward(cls, ctx, layout: _Layout, *args):
        op, args = cls.op, _grouped(layout.arguments, args)
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
            results = tuple(_flat(results))
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
            kept.update(zip(lists, _grouped(list(lists.values()), tensors[len(names) :])))
        asked = ctx.needs_input_grad[1:]
        if layout.arguments is not None:
            asked = [any(one) if type(one) is list else one for one in _grouped(layout.arguments, asked)]
        found = op.backward(SimpleNamespace(**kept), op.inputs(*asked), *_grouped(layout.results, gradients))
        given = [found.get(name) for name in op.parameters]
        if layout.arguments is not None:
            given = _flat([g or [None] * n if n is not None else g for g, n in zip(given, layout.arguments)])
        return None, *given


def _flat(args: Iterable) -> list:
    flat = []
    for arg in args:
        if type(arg) is list:
            flat += arg
        else:
            flat.append(arg)
    return flat


def _grouped(sizes: list[int | None] | None, flat):
    """The inverse of `_flat`; without sizes `flat` itself."""
    if sizes is None:
        return flat
    left = iter(flat)
    return tuple(next(left) if size is None else [next(left) for _ in range(size)] for size in sizes)


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


def find_function(column: str, file: str, name: str) -> Callable | None:
    """The function `name` in kernels/<column>/<file>.py, None if it is missing or the column cannot run here."""
    if column == "cpu" and not importlib.import_module("kernels.cpu").available():
        return None
    if importlib.util.find_spec(f"kernels.{column}.{file}") is None:
        return None
    function = getattr(importlib.import_module(f"kernels.{column}.{file}"), name, None)
    if function is not None and not hasattr(function, "supports"):
        function.supports = _always
    return function


def _always(*_) -> bool:
    return True


def _first_tensor(args: tuple) -> Tensor:
    first = args[0]
    if isinstance(first, list):
        first = first[0]
    return first.values if isinstance(first, Weight) else first


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
