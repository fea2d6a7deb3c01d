"""The memory and FLOPs of a training step, found by running it on the meta device.

The step is the real one: the model's own code, the adapters, the loss, backward and the optimizer. On the meta device
every tensor has its shape, dtype and lifetime but no bytes (allocations.py). So autograd itself decides which tensors
live. Kept tensors, checkpointing and views are counted for any architecture. No formula is needed. FLOPs are
counted on the way, with torch's own formulas (torch.utils.flop_counter).

Beside the results of operations, these are counted:
- attention is torch's fused kernel, which keeps q, k, v, the output and fp32 log-sums; on the meta device torch would
  take the unfused form, which no device runs but a CPU with dropout;
- a linear over packed codes has its dense weight while it computes: the Triton launcher makes one in the compute dtype;
- autocast, which torch does not have on the meta device, casts the arguments of products.

Not seen: what libraries allocate inside one operation (cuBLAS workspaces, a GPU's blocks of attention), the CUDA
context, and what an allocator loses to fragmentation.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from experiments.plan.allocations import PHASES, Allocations
from experiments.plan.packs import pack_inputs
from experiments.training.gradients import checkpoint_blocks
from experiments.training.loss import LabelLoss
from experiments.training.offload import Offload
from kernels import use_backend
from modules import AdamW, NF4Linear
from modules.linear import weight_shape
from modules.mixtures import experts_modules

aten = torch.ops.aten


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


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention by the fused kernel, which takes a mask in the dtype of the query."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype, device=query.device)
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _Casts:
    """Autocast's casts of the arguments of products, and its copies of parameters until it ends.

    Args:
        dtype: to cast to; None: nothing is cast.

    Attributes:
        keeps: whether it remembers. It does through a forward pass; a block that backward computes again has an
            autocast of its own.
    """

    def __init__(self, dtype: torch.dtype | None):
        self.dtype, self.kept, self.keeps = dtype, {}, True

    def end(self) -> None:
        self.kept.clear()
        self.keeps = False

    def around(self, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`product`, whose tensors are cast first."""
        if self.dtype is None:
            return product
        return lambda *args, **more: product(*map(self._cast, args), **{k: self._cast(v) for k, v in more.items()})

    def _cast(self, value):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        if not self.keeps or not isinstance(value, nn.Parameter):
            return value.to(self.dtype)
        if value not in self.kept:
            self.kept[value] = value.to(self.dtype)
        return self.kept[value]


@contextlib.contextmanager
def _as_on_a_device(casts: _Casts, on_cpu: bool) -> Iterator[None]:
    """Behaviour of torch on every device but the meta device: fused attention, autocast of products."""
    attention, linear, bmm = F.scaled_dot_product_attention, F.linear, torch.bmm

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, **more):
        has_kernel = not (on_cpu and dropout_p)  # a CPU's has no dropout
        return (_fused_attention if has_kernel else attention)(query, key, value, attn_mask, dropout_p, **more)

    F.scaled_dot_product_attention = casts.around(attend)
    F.linear, torch.bmm = casts.around(linear), casts.around(bmm)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.linear, torch.bmm = attention, linear, bmm


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
    packed: int | None = None,
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
        packed: the one sequence is a pack of samples of so many tokens.
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
    given, masks = {"attention_mask": torch.ones_like(ids)}, []
    column = use_backend("cpu") if on_cpu else contextlib.nullcontext()
    if packed is not None:
        with column:
            given, masks = pack_inputs(model, seq, packed, on_cpu)
    tokens = {"input_ids": ids, "labels": torch.zeros(batch, seq, dtype=torch.int64), **given}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memory, casts = Allocations(on_cpu), _Casts(autocast)
    with memory, use_backend("cpu") if on_cpu else contextlib.nullcontext(), _as_on_a_device(casts, on_cpu):
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes its state
        optimizer.zero_grad(set_to_none=True)
        state = [
            tensor for of_one in optimizer.state.values() for tensor in of_one.values() if isinstance(tensor, Tensor)
        ]
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
    found = activations, loss_bytes, memory.weight, flops_a_pass, host_bytes, sum(idle.values())
    return Step(memory.peaks[phase], phase, *found)


def _note_idle(idle: dict[str, int], name: str, experts: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before a forward of a layer's experts: write down how many of their parameters a token does not meet."""
    top_k_index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
    if top_k_index is None:  # every token meets every expert
        return
    packed = (math.prod(weight_shape(linear)) for linear in experts.modules() if isinstance(linear, NF4Linear))
    parameters = sum(p.numel() for p in experts.parameters()) + sum(packed)
    idle[name] = parameters // experts.num_experts * (experts.num_experts - top_k_index.shape[-1])
