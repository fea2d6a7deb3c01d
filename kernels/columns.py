"""Which column of the grid runs an op.

CUDA tensors use the Triton cell. CPU tensors use the cpu cell. The reference runs in three cases: the cell is missing;
its `supports_if` refuses the tensors; the device is another one. For GPUs before sm_80 Triton 3.7 has no matrix
instructions: there ops with matrix products run the reference, and a warning says so.

`QDORA_BACKEND=reference|triton|cpu` in the environment, read once, or `use_backend(...)` chooses the column for all ops
(`torch` is an alias of `reference`). If that column cannot run an op, the reference runs and a warning says so once. If
the cpu column is asked for, it also takes meta tensors. They go through all steps but have no values. With
`TRITON_INTERPRET=1` in the environment before triton is imported, the Triton column also runs on CPU tensors, in
Triton's interpreter: slow, for proofs only.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from kernels.weight import Weight

BACKENDS = ("reference", "triton", "cpu")
_ALIASES = {"torch": "reference"}
_rows: dict[str, "Row"] = {}
_override: ContextVar[str | None] = ContextVar("qdora_backend", default=None)


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
    """True if the column that runs ops on x's device has a kernel of the op `name`.

    A kernel may support some tensors alone (`supports_if`): the op runs in plain torch for the others.

    Raises:
        ValueError: unknown name.
    """
    if name not in _rows:
        raise ValueError(f"has_kernel: no op is named {name!r}; choose one of {', '.join(sorted(_rows))}")
    if torch.compiler.is_compiling():
        return _has_kernel_while_compiling(name, x.device)
    return _rows[name].has_kernel(x)


@torch.compiler.assume_constant_result  # torch.compile cannot look into a ContextVar
def _has_kernel_while_compiling(name: str, device: torch.device) -> bool:
    return _rows[name].has_kernel(torch.empty(0, device=device))


def supports_if(condition: Callable[..., bool]) -> Callable[[Callable], Callable]:
    """Decorator of a cell: the cell runs only if `condition(arguments)` is true.

    A cell without this decorator always runs.
    """

    def mark(function: Callable) -> Callable:
        function.supports = condition
        return function

    return mark


class Row:
    """A row of the grid: the cells that compute one op.

    Args:
        name: the op's.
        file: the name of its file in each column, without ".py".
        products: the Triton kernels multiply matrices.
    """

    def __init__(self, name: str, file: str, products: bool):
        self.name, self.file, self.products = name, file, products
        self._cells: dict[str, Callable | None] = {}
        _rows[name] = self

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
        tensor = first_tensor(args)
        column = self._wanted(tensor)
        cell = self.cell(column)
        if cell is not None and cell.supports(*args):
            return column
        # nobody chose the column of the device, and on meta nothing is computed anyway
        if column != "reference" and not tensor.is_meta and (_override.get() or _environment()):
            _warn_of_reference(self.name, column)
        return "reference"

    def has_kernel(self, x: Tensor) -> bool:
        """True if the column that x belongs to has a cell and is not the reference."""
        column = self._wanted(x)
        return column != "reference" and self.cell(column) is not None

    def _wanted(self, x: Tensor) -> str:
        """The column that was asked for, else the one of x's device. It may have no cell."""
        column = _override.get() or _environment()
        if column is None:
            if x.is_cpu:
                return "cpu"
            on_gpu = x.is_cuda and (not self.products or _has_matrix_instructions(x.device))
            return "triton" if on_gpu else "reference"
        if column == "triton" and not (x.is_cuda or interpreting()):
            raise RuntimeError(
                f"backend 'triton' was asked for on a {x.device.type} tensor: move it to a GPU, "
                "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
            )
        if column == "cpu" and not (x.is_cpu or x.is_meta):
            raise RuntimeError(f"backend 'cpu' was asked for on a {x.device.type} tensor: move it to the CPU")
        return column


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


def first_tensor(args: tuple) -> Tensor:
    first = args[0]
    if isinstance(first, list):
        first = first[0]
    return first.values if isinstance(first, Weight) else first
