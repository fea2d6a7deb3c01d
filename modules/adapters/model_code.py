"""What the code of a model does with its linears, read from its source.

Some linears stay dense and get no adapter, because they are more or less than a product with x:
    own forward      a subclass of nn.Linear that computes something else: routers that return a pair, grouped products
    read             a linear whose weight or bias the model's code reads: it would get codes, or miss the adapter
Experts are linears of their own (modules/mixtures.py), but those of classes that are not known there stay as they are.

Some models change the result of a linear in place (Falcon). DoRA keeps its result for backward, so these get a copy.
"""

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from modules.experts import ExpertsLinear
from modules.linear import LoRALinear, NF4Linear, is_conv1d
from modules.mixtures import experts_weights

INITIALISE = ("__init__", "_init_weights", "reset_parameters")
OWN_FORWARD, READ = "its class computes more than a linear", "the model's code reads its weight"


def left_out(model: nn.Module) -> dict[str, str]:
    """The full names of these linears, and the reason for each."""
    modules = dict(model.named_modules())
    found = {}
    for path, module in modules.items():
        read = _of_methods(_code_of(module), _read)
        if isinstance(module, nn.MultiheadAttention):  # torch reads it
            read = {"out_proj"}
        for name in _named(modules, path, read):
            if isinstance(modules.get(name), nn.Linear) or is_conv1d(modules.get(name)):
                found[name] = READ
        if type(module).forward is not nn.Linear.forward and isinstance(module, nn.Linear) and not _is_product(module):
            found[path] = OWN_FORWARD
    return found


def _named(modules: dict[str, nn.Module], path: str, children: set[str]) -> Iterator[str]:
    """The full names that `children` may mean below the module `path`: paths, or the ends of paths after a `*`."""
    for child in children:
        if child.startswith("*"):
            yield from (name for name in modules if name.startswith(path) and name.endswith(child.removeprefix("*")))
        else:
            yield f"{path}.{child}".removeprefix(".")


@torch.no_grad()
def _is_product(linear: nn.Linear) -> bool:
    """True if the forward of the class of `linear` is that of nn.Linear, only written otherwise."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator, device="cpu") for size in ((4, 8), (4,), (1, 3, 8)))
    stand_in = copy.copy(linear)
    bias = None if linear.bias is None else bias
    stand_in.__dict__ |= {"_parameters": {"weight": weight, "bias": bias}, "in_features": 8, "out_features": 4}
    try:
        y = stand_in.forward(x)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    want = nn.functional.linear(x, weight, bias)
    return isinstance(y, Tensor) and y.shape == want.shape and torch.allclose(y, want, atol=1e-5)


def _code_of(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, or of the model's own that it took the place of."""
    return getattr(module, "own_class", type(module))


@functools.cache
def _of_methods(kind: type[nn.Module], look: Callable[[ast.AST], set[str]]) -> frozenset[str]:
    """All that `look` finds in the methods of the class `kind`: paths of modules below such a module."""
    found: set[str] = set()
    if kind.__module__.partition(".")[0] not in ("torch", "kernels", "modules"):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if name not in INITIALISE and not name.startswith("init_") and not method.__module__.startswith("torch."):
                found |= _in_method(method, look)
    return frozenset(found)


@functools.cache
def _in_method(method: Callable, look: Callable[[ast.AST], set[str]]) -> set[str]:
    try:
        return look(ast.parse(textwrap.dedent(inspect.getsource(method))))
    except (OSError, TypeError, SyntaxError):  # made without a file
        return set()


def _read(tree: ast.AST) -> set[str]:
    """`self.a.weight` means `a`; `block.a.b.weight`, of a local variable, any module whose path ends with `.a.b`."""
    found = set()
    for node in _nodes(tree):
        if _reads(node) and isinstance(node.value, ast.Attribute):
            owner, _, path = ast.unparse(node.value).partition(".")
            found.add(path if owner == "self" else f"*.{path}")
    return found


def _reads(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and isinstance(node.ctx, ast.Load)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of branches for `pretraining_tp`, with which Bloom repeats its training on many GPUs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "pretraining_tp" in ast.unparse(node.test):
            yield from node.orelse
            for other in node.orelse:
                yield from _nodes(other)
        else:
            yield node
            yield from _nodes(node)


def unknown_experts(model: nn.Module) -> dict[str, int]:
    """The parameters that hold the weights of several experts in a way that modules/mixtures.py does not know, by full
    name, and their numbers of values."""
    known, found = {*experts_weights(model)}, {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | NF4Linear | ExpertsLinear | LoRALinear) or is_conv1d(module):
            continue
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}"
            words = f"{full} {type(module).__name__}".lower()
            if parameter is not None and parameter.dim() > 1 and "expert" in words and full not in known:
                found[full] = parameter.numel()
    return found


def changed_in_place(model: nn.Module) -> set[str]:
    """The full names of the modules whose results the model's code may change in place."""
    modules = dict(model.named_modules())
    names = (f"{path}.{child}" for path, module in modules.items() for child in _of_methods(_code_of(module), _changed))
    return {name.removeprefix(".") for name in names} & modules.keys()


def _changed(tree: ast.AST) -> set[str]:
    origin: dict[str, set[str]] = {}  # the modules that a local variable may be a result of
    found: set[str] = set()
    for node in sorted(_nodes(tree), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            came = _came_from(node.value, origin)
            for name in ast.walk(ast.Tuple(targets)):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    origin[name.id] = came
            changed = [target.value for target in targets if isinstance(target, ast.Subscript)]
        elif isinstance(node, ast.AugAssign):
            changed = [node.target.value if isinstance(node.target, ast.Subscript) else node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
            changed = [node.func.value]
        else:
            changed = []
        for name in changed:
            found |= origin.get(name.id, set()) if isinstance(name, ast.Name) else set()
    return found


def _came_from(value: ast.AST, origin: dict[str, set[str]]) -> set[str]:
    """The modules that `value` may be a result of, or a view of one: m(…), m(…)[0], a name for such, m(…).view(…)."""
    if isinstance(value, ast.Name):
        return origin.get(value.id, set())
    if isinstance(value, ast.Subscript | ast.Attribute | ast.Starred):
        return _came_from(value.value, origin)
    if isinstance(value, ast.Tuple):
        return set().union(*(_came_from(part, origin) for part in value.elts))
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func)
        if called.startswith("self.") and called.count(".") == 1:
            return {called.removeprefix("self.")}
        return _came_from(value.func, origin)
    return set()
