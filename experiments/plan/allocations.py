"""Bytes and FLOPs of operations on the meta device, where tensors have shapes and lifetimes but no values.

A dispatch mode sees each operation: it adds the storages that come into being, takes off those that are released, and
remembers the highest sum.

For a CPU our ops run as kernels/cpu/ has them: torch's operations, and kernels that do nothing on meta tensors but
write to memory that is counted; rows of experts are spread evenly, and one expert at a time is dense. For a GPU an op
is one operation, but for the loss, which is taken apart into chunks; a few experts of a linear are dense at a time.
"""

import functools
import math
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from experiments.plan import flops
from kernels.cross_entropy import by_chunks, precise
from kernels.weight import experts_of_part, packed_shape

aten, qdora = torch.ops.aten, torch.ops.qdora
PHASES = ("forward", "loss", "backward", "optimizer")
ATTENTION = (qdora.attention, qdora.attention_backward)
ON_CPU = (  # ops that are taken apart there
    *(qdora.rms_norm, qdora.rms_norm_backward, qdora.swiglu, qdora.swiglu_backward),
    *(qdora.rotary, qdora.rotary_backward, *ATTENTION, qdora.linear_cross_entropy),
    *(*flops.LINEARS, *flops.EXPERTS, qdora.joined_linears, qdora.joined_linears_backward),
)
POSITIONS = (aten.index, aten.index_put, aten._index_put_impl_)  # which tokens carry labels decides shapes


class Allocations(TorchDispatchMode):
    """Counts the bytes of live meta tensors, and answers for their values, which they do not have.

    Args:
        on_cpu: compute as a CPU does.
    """

    def __init__(self, on_cpu: bool = False):
        super().__init__()
        self.on_cpu = on_cpu
        self.live = self.weight = self.flops = 0
        self.peaks = dict.fromkeys(PHASES, 0)
        self.phase = PHASES[0]
        self.storages: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is new, until it is released."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.is_meta and key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self._release(key, size))
            self.live += size
            self.peaks[self.phase] = max(self.peaks[self.phase], self.live)

    def _release(self, key: int, size: int) -> None:
        del self.storages[key]
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {tensor.is_meta for tensor in _tensors((*args, *kwargs.values()))}
        on_meta = True in given
        if func is aten._local_scalar_dense.default and on_meta:
            return 1  # the value that .item() reads: a loss, a norm, whether tokens are padding (none is)
        if func is aten.nonzero.default and on_meta:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)  # rows for special care: none
        packet = func.overloadpacket
        keeps = packet in POSITIONS or (self.on_cpu and packet in ATTENTION)  # labels and masks are real
        if len(given) == 2 and not keeps:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if _is_composite(func):  # a call of a reference comes here before it is taken apart
            with self:
                return func.decompose(*args, **kwargs)
        scratch = _dense_weight(func, args, self.on_cpu)
        self.weight = max(self.weight, scratch)
        if packet is qdora.linear_cross_entropy and not self.on_cpu:
            with self:
                return by_chunks(_loss_by_kernel, *args)
        if self.on_cpu and packet in ON_CPU:
            if packet in flops.EXPERTS:
                args = _with_even_ends(func, args)
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        out = (_grouped_products if packet is aten._grouped_mm else func)(*args, **kwargs)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        for tensor in _tensors((out,)):
            self.add(tensor)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live + scratch)
        return out


def _loss_by_kernel(logits: Tensor, _targets: Tensor) -> Tensor:
    """Σ cross-entropy of a chunk by a kernel, which writes the gradient in the place of the logits."""
    return logits.new_empty((), dtype=precise(logits))


@functools.cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    """True if every device takes `func` apart into other operations."""
    composite, kernel = DispatchKey.CompositeImplicitAutograd, DispatchKey.CPU
    return func.has_kernel_for_dispatch_key(composite) and not func.has_kernel_for_dispatch_key(kernel)


def _tensors(values: Iterable) -> Iterator[Tensor]:
    """The tensors among `values`, lists of them included. (torch's tree functions take twice as long as the step.)"""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _dense_weight(func: torch._ops.OpOverload, args: tuple, on_cpu: bool) -> int:
    """Bytes of the dense weight that one of our linears makes while it computes; 0 if it has no packed weight."""
    if func.overloadpacket not in (*flops.LINEARS, *flops.EXPERTS):
        return 0
    given = _by_name(func, args)
    if len(given["weight"]) == 1:
        return 0
    shape, dtype = packed_shape(given["weight_format"]), args[0].dtype
    if func.overloadpacket in flops.EXPERTS:
        shape = (1 if on_cpu else experts_of_part(shape, dtype), *shape[1:])
    return math.prod(shape) * dtype.itemsize


def _by_name(func: torch._ops.OpOverload, args: tuple) -> dict:
    return dict(zip((argument.name for argument in func._schema.arguments), args))


def _with_even_ends(func: torch._ops.OpOverload, args: tuple) -> list:
    """`args` of an op of experts, with the ends of rows that are spread evenly over the experts."""
    given = _by_name(func, args)
    rows, experts = len(args[0]), len(given["ends"])
    ends = torch.arange(1, experts + 1, device="cpu") * rows // experts
    return [*(given | {"ends": ends.int()}).values()]


def _grouped_products(a: Tensor, b: Tensor, offs: Tensor, *_) -> Tensor:
    """torch._grouped_mm of rows [S, K] and [G, K, N], or of columns [M, S] and [S, N]: for widths that are no multiple
    of 16 bytes, and in dtypes, that the meta device refuses and others take."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(len(offs), a.shape[0], b.shape[1])
