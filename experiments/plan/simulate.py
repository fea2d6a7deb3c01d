"""The memory and FLOPs of a training step, found by running it on the meta device.

The step is the real one: the model's own code, the adapters, the loss, backward and the optimizer. On the meta device
every tensor has its shape, dtype and lifetime but no bytes. A dispatch mode sees each operation: it adds the storages
that come into being, takes off those that are released, and remembers the highest sum. So autograd itself decides which
tensors live. Kept tensors, checkpointing and views are counted for any architecture. No formula is needed. FLOPs are
counted on the way, with torch's own formulas (torch.utils.flop_counter).

Beside the results of operations, these are counted:
- attention is torch's fused kernel, which keeps q, k, v, the output and fp32 log-sums; on the meta device torch would
  take the unfused form, which no device runs;
- a linear over packed codes has its dense weight while it computes: the Triton launcher makes one in the compute dtype;
- autocast, which torch does not have on the meta device, casts the arguments of products.

For a CPU our ops run as kernels/cpu/ has them: torch's operations, and kernels that do nothing on meta tensors but
write to memory that is counted. For a GPU an op is one operation, but for the loss, which is taken apart into chunks.

Not seen: what libraries allocate inside one operation (cuBLAS workspaces, a GPU's blocks of attention), the CUDA
context, and what an allocator loses to fragmentation.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from experiments.plan import flops
from experiments.plan.meta_device import Casts, as_on_a_device, grouped_products
from experiments.training.gradients import checkpoint_blocks
from experiments.training.loss import LabelLoss
from experiments.training.offload import Offload
from kernels import use_backend
from kernels.cross_entropy import by_chunks, precise
from modules import AdamW, NF4Linear
from modules.experts import experts_modules
from modules.linear import weight_shape

aten = torch.ops.aten
PHASES = ("forward", "loss", "backward", "optimizer")
qdora = torch.ops.qdora
ON_CPU = (  # ops that are taken apart there
    *(qdora.rms_norm, qdora.rms_norm_backward, qdora.swiglu, qdora.swiglu_backward),
    *(qdora.rotary, qdora.rotary_backward, qdora.attention, qdora.attention_backward, qdora.linear_cross_entropy),
    *(*flops.LINEARS, *flops.EXPERTS, qdora.joined_linears, qdora.joined_linears_backward),
)
POSITIONS = (aten.index, aten.index_put, aten._index_put_impl_)  # which tokens carry labels decides shapes


@dataclass
class Step:
    """A simulated training step; bytes.

    Attributes:
        peak: the most that was allocated, parameters and optimizer state included.
        phase: in which of PHASES that was.
        activations: kept between forward and backward.
        loss: the most that the loss allocated beside what was there before it.
        weight: the largest dense weight that was made of a packed one; 0 without any.
        flops: of the step, those that checkpointing repeats included.
        host: in pinned host memory, where activations are kept there.
        idle: parameters of experts that a token does not meet.
    """

    peak: int
    phase: str
    activations: int
    loss: int
    weight: int
    flops: int
    host: int = 0
    idle: int = 0


class _OnHost:
    """Copies of activations to host memory, which is not the device's, and back."""

    def __init__(self):
        self.nbytes = 0

    def to_host(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.nbytes += tensor.nbytes
        return tensor.shape, tensor.dtype

    def to_device(self, host: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(host[0], dtype=host[1], device="meta")

    def arrived(self, copy: Tensor) -> Tensor:
        return copy


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
        if len(given) == 2 and packet not in POSITIONS:  # labels are real
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if _is_composite(func):  # a call of a reference comes here before it is taken apart
            with self:
                return func.decompose(*args, **kwargs)
        scratch = _dense_weight(func, args)
        self.weight = max(self.weight, scratch)
        if packet is qdora.linear_cross_entropy and not self.on_cpu:
            with self:
                return by_chunks(_loss_by_kernel, *args)
        if self.on_cpu and packet in ON_CPU:
            if packet in flops.EXPERTS:
                args = _with_even_ends(func, args)
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        out = (grouped_products if packet is aten._grouped_mm else func)(*args, **kwargs)
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


def _dense_weight(func: torch._ops.OpOverload, args: tuple) -> int:
    """Bytes of the dense weight that one of our linears makes while it computes; 0 if it has no packed weight. Of
    experts those that have rows are dense at once."""
    if func.overloadpacket not in (*flops.LINEARS, *flops.EXPERTS):
        return 0
    given = _by_name(func, args)
    codes, *constants = given["weight"]
    if not constants:
        return 0
    dense = 2 * codes.numel() * args[0].element_size()
    if func.overloadpacket in flops.EXPERTS:
        experts = len(given["ends"])
        dense = dense // experts * flops.with_rows(len(args[0]), experts)
    return dense


def _by_name(func: torch._ops.OpOverload, args: tuple) -> dict:
    return dict(zip((argument.name for argument in func._schema.arguments), args))


def _with_even_ends(func: torch._ops.OpOverload, args: tuple) -> list:
    """`args` of an op of experts, with the ends of rows that are spread evenly over the experts."""
    given = _by_name(func, args)
    rows, experts = len(args[0]), len(given["ends"])
    ends = torch.arange(1, experts + 1, device="cpu") * rows // experts
    return [*(given | {"ends": ends.int()}).values()]


def loss_of(model: PreTrainedModel) -> LabelLoss:
    """The loss of `model`, which is on the meta device."""
    with Allocations():
        return LabelLoss(model)


def simulate(
    label_loss: LabelLoss,
    optimizer: AdamW,
    batch: int,
    seq: int,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    accumulating: bool = False,
    on_cpu: bool = False,
    packed: bool = False,
    offloading: bool = False,
) -> Step:
    """A training step of a model on the meta device, after the first.

    Args:
        label_loss: of the model, by `loss_of`.
        optimizer: over its trained parameters, without pages.
        batch, seq: sequences of a forward pass and their tokens, all of them labelled and none padded.
        autocast: the dtype in which linears run whose weights train in fp32.
        checkpointing: of each block.
        accumulating: a second forward pass follows the first, with its gradients there.
        on_cpu: as on a CPU.
        packed: each sequence is a pack of samples. On a GPU its attention needs no mask (training/packing.py).
        offloading: what checkpointing keeps is kept in host memory.

    Raises:
        UserError: checkpointing of a model that cannot.
    """
    model = label_loss.model.train()
    host = _OnHost()
    if checkpointing:
        checkpoint_blocks(model, offload=Offload(host) if offloading else None)
    else:
        model.activation_checkpointing_disable()
    ids = torch.zeros(batch, seq, dtype=torch.int64, device="meta")
    tokens = {"input_ids": ids, "position_ids" if packed else "attention_mask": torch.ones_like(ids)}
    tokens["labels"] = torch.zeros(batch, seq, dtype=torch.int64)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memory, casts = Allocations(on_cpu), Casts(autocast)
    column = use_backend("cpu") if on_cpu else contextlib.nullcontext()
    with memory, column, as_on_a_device(casts):
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes its state
        optimizer.zero_grad(set_to_none=True)
        state = [
            tensor for of_one in optimizer.state.values() for tensor in of_one.values() if isinstance(tensor, Tensor)
        ]
        masks = [torch.empty(1, 1, seq, seq, dtype=torch.bool, device="meta")] if packed and on_cpu else []
        for tensor in (*model.parameters(), *model.buffers(), *state, *masks):
            memory.add(tensor)
        memory.peaks, memory.flops, before_loss = dict.fromkeys(PHASES, 0), 0, 0

        def loss_begins(*_) -> None:
            nonlocal before_loss
            memory.phase, before_loss = "loss", memory.live

        idle: dict[str, int] = {}
        hooks = [model.get_output_embeddings().register_forward_pre_hook(loss_begins)]
        for name, experts in experts_modules(model):
            note = functools.partial(_note_idle, idle, name)
            hooks.append(experts.register_forward_pre_hook(note, with_kwargs=True))
        activations = None
        for _ in range(2 if accumulating else 1):
            memory.phase, before, casts.keeps = "forward", memory.live, True
            loss = label_loss(tokens) / ids.numel()
            casts.end()
            host_bytes, host.nbytes = host.nbytes, 0
            activations = memory.live - before if activations is None else activations
            loss.item()
            memory.phase = "backward"
            loss.backward()
            del loss
        for hook in hooks:
            hook.remove()
        memory.phase = "optimizer"
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    phase = max(PHASES, key=memory.peaks.get)
    flops_a_pass = memory.flops // (2 if accumulating else 1)
    loss_bytes = memory.peaks["loss"] - before_loss
    return Step(
        memory.peaks[phase],
        phase,
        activations,
        loss_bytes,
        memory.weight,
        flops_a_pass,
        host_bytes,
        sum(idle.values()),
    )


def _note_idle(idle: dict[str, int], name: str, experts: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before a forward of a layer's experts: write down how many of their parameters a token does not meet."""
    top_k_index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
    if top_k_index is None:  # every token meets every expert
        return
    packed = (math.prod(weight_shape(linear)) for linear in experts.modules() if isinstance(linear, NF4Linear))
    parameters = sum(p.numel() for p in experts.parameters()) + sum(packed)
    idle[name] = parameters // experts.num_experts * (experts.num_experts - top_k_index.shape[-1])
