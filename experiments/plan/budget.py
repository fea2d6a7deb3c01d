"""The memory that a configuration needs on each GPU, part by part, in bytes."""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.config import Config
from experiments.errors import UserError
from experiments.models.architecture import meta_model
from experiments.models.load import adapt, weights_dtype
from experiments.plan.allocations import Allocations
from experiments.plan.simulate import Step, loss_of, simulate
from experiments.runs.result_numbers import nbytes, storage
from experiments.training.optim import OPTIMIZERS
from modules import LoRALinear, NF4Linear, adapters, decoder_linears, fuse, parameter_groups
from modules.adapters.config import REACHED
from modules.experts import ExpertsLinear
from modules.linear import weight_shape
from modules.paging import PAGE_BYTES

PAGED_MB = 64  # that pages may occupy, in a plan without them


@dataclass(frozen=True)
class Stored:
    """A model's tensors by their kind.

    Attributes:
        packed: codes of linears in 4 bits.
        constants: turn codes into weights: absmax, and with double quantization its own absmax and offset.
        dense: weights that are not packed, and buffers.
        adapters: tensors that a method adds or trains beside the base.
    """

    packed: list[Tensor]
    constants: list[Tensor]
    dense: list[Tensor]
    adapters: list[Tensor]

    def all(self) -> list[Tensor]:
        return [*self.packed, *self.constants, *self.dense, *self.adapters]


def stored(model: nn.Module) -> Stored:
    """The tensors of `model`, each once."""
    parts = Stored([], [], [], [])
    has_adapter, seen = bool(adapters(model)), set()
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, NF4Linear) and name != "bias":
                (parts.packed if name == "weight" else parts.constants).append(tensor)
            elif isinstance(module, LoRALinear) or (has_adapter and tensor.requires_grad):
                parts.adapters.append(tensor)
            else:
                parts.dense.append(tensor)
    return parts


def shard_bytes(parts: Stored, gpus: int) -> int:
    """Bytes on the first GPU of a model that FSDP2 shards (experiments/training/engines.py): its part of parameters,
    codes and constants, cut along the first dimension and rounded up; buffers and numbers whole."""
    cut = [
        *parts.packed,
        *parts.constants,
        *(t for t in (*parts.dense, *parts.adapters) if isinstance(t, nn.Parameter)),
    ]
    whole = nbytes(parts.all()) - nbytes(cut)
    return whole + sum(_shard_bytes(tensor, gpus) for tensor in cut)


def _shard_bytes(tensor: Tensor, gpus: int) -> int:
    if tensor.dim() == 0:
        return tensor.element_size()
    return -(-tensor.shape[0] // gpus) * math.prod(tensor.shape[1:]) * tensor.element_size()


@dataclass(frozen=True)
class Budget:
    """The needs of a run, in bytes unless it says otherwise.

    Attributes:
        longest: the most tokens that a sequence can have.
        widest: the highest rank that each of its linears can have.
        parameters, trained: their numbers.
        bits: a weight of the decoder's linears occupies.
        tokens: of a forward pass on one GPU.
        logits: fp32 [tokens, vocabulary], which the loss does not make.
        packed, constants, dense, adapters: see Stored.
        gradients: of the trained parameters.
        states: of each optimizer, by its name; without pages.
        paged: on the device, of the configured one with pages, within PAGED_MB unless optim.budget_mb says otherwise.
        state: on the device, of the configured one as it is configured.
        checkpoints: whether blocks of the model can be checkpointed.
        step: simulates one, with checkpointing or without.
        gathered: tensors that sharded GPUs gather for a while; None: the model cannot be sharded.
    """

    longest: int
    widest: int
    parameters: int
    trained: int
    bits: float
    tokens: int
    logits: int
    packed: int
    constants: int
    dense: int
    adapters: int
    gradients: int
    states: dict[str, int]
    paged: int
    state: int
    checkpoints: bool
    gathered: int | None
    stored: Stored
    optimizer: str
    step: Callable[[bool], Step]

    def peak(self, checkpointing: bool) -> int:
        """On one GPU."""
        return self.step(checkpointing).peak - self.states[self.optimizer] + self.state

    def replicated(self, gpus: int, checkpointing: bool) -> int:
        """On each of several GPUs that hold the model and its gradients, which they exchange in buckets as large, and
        share the optimizer's state (trainer.parallel=ddp)."""
        if gpus == 1:
            return self.peak(checkpointing)
        return self.peak(checkpointing) + self.gradients - self.state + self.state // gpus

    def sharded(self, gpus: int, checkpointing: bool) -> int | None:
        """On each of several GPUs that share everything but the activations (trainer.parallel=fsdp); None: they
        cannot."""
        if gpus == 1:
            return self.peak(checkpointing)
        if self.gathered is None:
            return None
        tensors = self.stored.all()
        trains = [tensor for tensor in tensors if tensor.requires_grad]
        whole = nbytes(tensors) + self.gradients + self.state
        gradients = sum(_shard_bytes(tensor, gpus) for tensor in trains)
        shares = shard_bytes(self.stored, gpus) + gradients + self.state // gpus
        return self.peak(checkpointing) - whole + shares + self.gathered


def _gathered(cfg: Config, model: PreTrainedModel, parts: Stored) -> int | None:
    """Bytes that FSDP2 gathers for a while: a block, the next one, and all outside of blocks; None: it cannot train
    this (experiments/system/parallel.py)."""
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not blocks or cfg.optim.name == "adamw8bit" or cfg.method.adapter not in ("none", "lora", "dora"):
        return None
    in_blocks = [nbytes((*block.parameters(), *block.buffers())) for block in blocks]
    return 2 * max(in_blocks) + nbytes(parts.all()) - sum(in_blocks)


def _longest(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)


def planned_model(cfg: Config, dtype: torch.dtype, seq: int = 0) -> PreTrainedModel:
    """The configured model on the meta device, packed and with its adapters.

    Raises:
        UserError: no such model, or one without linears, or with fewer positions than `seq`; settings that do not fit
        it.
    """
    model = meta_model(cfg.model, weights_dtype(cfg, dtype))
    if seq > _longest(model):
        raise UserError(f"seq={seq} is longer than the {_longest(model)} tokens that model={cfg.model.name} can have")
    if not decoder_linears(model):
        raise UserError(f"model={cfg.model.name}: {type(model).__name__} has no linears to pack or to adapt")
    fuse(model)
    # eva reads data, and gives tensors of the default's shapes; and data may reach all experts
    cfg = replace(cfg, init="default") if cfg.init == "eva" else cfg
    cfg = replace(cfg, experts=None) if cfg.experts == REACHED else cfg
    with Allocations():
        adapt(cfg, model, None, torch.device("meta"))
    return model


def most_gpus(model: PreTrainedModel) -> tuple[int, str]:
    """On how many GPUs shards make sense, and why: a linear has that many rows, or dense experts, and more would get
    nothing."""
    linears = decoder_linears(model)
    parts = {name: _parts(linear) for name, linear in linears.items()}
    name = min(parts, key=parts.get)
    return parts[name], f"{name} has {parts[name]} {'experts' if isinstance(linears[name], ExpertsLinear) else 'rows'}"


def _parts(linear: nn.Module) -> int:
    """Into how many parts a linear can be cut. Dense experts stay whole; the codes of packed ones are one tensor."""
    return linear.num_experts if isinstance(linear, ExpertsLinear) else math.prod(weight_shape(linear)[:-1])


def budget(cfg: Config, dtype: torch.dtype, batch: int, seq: int, gpus: int = 1, on_cpu: bool = False) -> Budget:
    """The budget of `cfg` computing in `dtype` on `batch` sequences of `seq` tokens on each of up to so many GPUs. With
    data.packing=true these are samples of one pack, which has `trainer.tokens` tokens if that is set.

    Args:
        on_cpu: as the code for a CPU does it.

    Raises:
        UserError: see `planned_model`; more GPUs than a linear has rows.
    """
    model = planned_model(cfg, dtype, seq)
    rows, length = (1, cfg.trainer.tokens or batch * seq) if cfg.data.packing else (batch, seq)
    if seq > length:
        raise UserError(f"seq={seq} fits no pack of trainer.tokens={length}: raise it")
    most, why = most_gpus(model)
    if gpus > most:
        raise UserError(f"gpus={gpus}: {why}, so shards make sense on {most} GPUs at most")
    parts = stored(model)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizers = {name: of(parameter_groups(model, cfg.lr)) for name, of in OPTIMIZERS.items()}
    states = {name: _state_bytes(optimizer, trains) for name, optimizer in optimizers.items()}
    optimizer = optimizers[cfg.optim.name]
    paged = (cfg.optim.budget_mb or PAGED_MB) * 2**20 // PAGE_BYTES * PAGE_BYTES
    if states[cfg.optim.name] < paged:  # so few pages that they may all be on the device
        paged = min(paged, len(optimizer.fill_pages(PAGE_BYTES)[1]) * PAGE_BYTES)
    autocast = dtype if cfg.method.adapter == "none" and dtype != torch.float32 else None

    label_loss = functools.cache(lambda: loss_of(model))

    @functools.cache
    def step(checkpointing: bool) -> Step:
        fresh = OPTIMIZERS[cfg.optim.name](parameter_groups(model, cfg.lr))
        several, offloading = cfg.trainer.grad_accum > 1, cfg.trainer.offload_activations and not on_cpu
        about = (autocast, checkpointing, several, on_cpu, seq if cfg.data.packing else None, offloading)
        return simulate(label_loss(), fresh, rows, length, *about)

    found = storage(model)
    return Budget(
        longest=_longest(model),
        widest=min(min(weight_shape(linear)[-2:]) for linear in decoder_linears(model).values()),
        parameters=found["total_params"],
        trained=found["trainable_params"],
        bits=found["bits_per_weight"],
        tokens=rows * length,
        logits=4 * rows * length * model.config.get_text_config().vocab_size,
        packed=nbytes(parts.packed),
        constants=nbytes(parts.constants),
        dense=nbytes(parts.dense),
        adapters=nbytes(parts.adapters),
        gradients=nbytes(trains),
        states=states,
        paged=paged,
        state=paged if cfg.optim.paged else states[cfg.optim.name],
        checkpoints=model.supports_gradient_checkpointing,
        gathered=_gathered(cfg, model, parts),
        stored=parts,
        optimizer=cfg.optim.name,
        step=step,
    )


def _state_bytes(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> int:
    """Bytes on the device of the optimizer's state, without pages. Beside it there is a number of steps on the host."""
    layouts = (optimizer.state_layout(p, p.numel()).values() for p in params)
    return sum(n * dtype.itemsize for layout in layouts for dtype, n in layout)
