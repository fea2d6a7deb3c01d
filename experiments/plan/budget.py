"""The memory that a configuration needs on each GPU, part by part, in bytes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments import results
from experiments.architecture import meta_model
from experiments.config import Config
from experiments.errors import UserError
from experiments.models import adapt, weights_dtype
from experiments.optim import OPTIMIZERS
from experiments.plan.simulate import Step, loss_of, simulate
from modules import LoRALinear, NF4Linear, adapters, decoder_linears, parameter_groups
from modules.linear import weight_shape
from modules.paging import PAGE_BYTES


@dataclass(frozen=True)
class Stored:
    """A model's tensors by what they are.

    Attributes:
        packed: codes of the linears in NF4.
        constants: what turns codes into weights: absmax, and with double quantization its own absmax and offset.
        dense: weights that are not packed, and buffers.
        adapters: what a method adds or trains beside the base.
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


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shard_bytes(tensors: Iterable[Tensor], gpus: int) -> int:
    """The largest of the shards when each tensor is split along its first dimension, as FSDP2 does."""
    return sum(
        -(-tensor.shape[0] // gpus) * math.prod(tensor.shape[1:]) * tensor.element_size()
        if tensor.dim()
        else tensor.element_size()
        for tensor in tensors
    )


@dataclass(frozen=True)
class Budget:
    """What a run needs, in bytes where nothing else is said.

    Attributes:
        parameters, trained: their numbers.
        bits: a weight of the decoder's linears occupies.
        tokens: of a forward pass.
        logits: fp32 [tokens, vocabulary], which the loss does not make.
        packed, constants, dense, adapters: see Stored.
        gradients: of what trains.
        states: of each optimizer, by its name; without pages.
        state: of the configured one; with pages what of it is on the device.
        plain, checkpointed: a step; None: the model cannot be checkpointed.
        gathered: what sharding brings together for a while: of two blocks, and of what is in none.
    """

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
    state: int
    plain: Step
    checkpointed: Step | None
    gathered: int
    stored: Stored
    optimizer: str

    def step(self, checkpointing: bool) -> Step | None:
        return self.checkpointed if checkpointing else self.plain

    def peak(self, checkpointing: bool) -> int:
        """On one GPU."""
        return self.step(checkpointing).peak - self.states[self.optimizer] + self.state

    def replicated(self, gpus: int, checkpointing: bool) -> int:
        """On each of several GPUs that hold everything: with the buckets in which gradients are exchanged."""
        return self.peak(checkpointing) + (self.gradients if gpus > 1 else 0)

    def sharded(self, gpus: int, checkpointing: bool) -> int:
        """On each of several GPUs that hold a share of everything but the activations."""
        if gpus == 1:
            return self.peak(checkpointing)
        whole = nbytes(self.stored.all()) + self.gradients + self.state
        trains = [tensor for tensor in self.stored.all() if tensor.requires_grad]
        of_state = self.state / self.gradients if self.gradients else 0.0  # bytes of it to one of gradients
        shares = shard_bytes(self.stored.all(), gpus) + round(shard_bytes(trains, gpus) * (1 + of_state))
        return self.peak(checkpointing) - whole + shares + self.gathered


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the longest list of modules in it."""
    return list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[]))


def planned_model(cfg: Config, dtype: torch.dtype) -> PreTrainedModel:
    """The configured model on the meta device, packed and with its adapters.

    Raises:
        UserError: no such model, or one without linears, or settings that do not fit it.
    """
    model = meta_model(cfg.model, weights_dtype(cfg, dtype))
    if not decoder_linears(model):
        raise UserError(f"model={cfg.model.name}: {type(model).__name__} has no linears to pack or to adapt")
    # eva reads data, and gives tensors of the default's shapes
    adapt(replace(cfg, init="default") if cfg.init == "eva" else cfg, model, None, torch.device("meta"))
    return model


def budget(cfg: Config, dtype: torch.dtype, batch: int, seq: int, twins: bool = False) -> Budget:
    """What `cfg` needs to compute in `dtype` on `batch` sequences of `seq` tokens.

    Args:
        twins: on a CPU.

    Raises:
        UserError: see `planned_model`; a sequence longer than the model takes.
    """
    model = planned_model(cfg, dtype)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and seq > longest:
        raise UserError(f"seq={seq} is longer than model={cfg.model.name} takes: {longest} tokens")
    parts = stored(model)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizers = {name: of(parameter_groups(model, cfg.lr)) for name, of in OPTIMIZERS.items()}
    states = {name: _state_bytes(optimizer, trains) for name, optimizer in optimizers.items()}
    optimizer = optimizers[cfg.optim.name]
    state = states[cfg.optim.name]
    if cfg.optim.paged:
        frames = cfg.optim.budget_mb * 2**20 // PAGE_BYTES
        state = min(frames, len(optimizer.fill_pages(PAGE_BYTES)[1])) * PAGE_BYTES
    autocast = dtype if cfg.method.adapter == "none" and dtype != torch.float32 else None

    label_loss = loss_of(model)

    def step(checkpointing: bool) -> Step:
        fresh = OPTIMIZERS[cfg.optim.name](parameter_groups(model, cfg.lr))
        return simulate(label_loss, fresh, batch, seq, autocast, checkpointing, cfg.trainer.grad_accum > 1, twins)

    storage = results.storage(model)
    in_blocks = [list(block.parameters()) + list(block.buffers()) for block in blocks(model)]
    outside = nbytes(parts.all()) - sum(map(nbytes, in_blocks))
    return Budget(
        parameters=storage["total_params"],
        trained=storage["trainable_params"],
        bits=storage["bits_per_weight"],
        tokens=batch * seq,
        logits=4 * batch * seq * model.config.get_text_config().vocab_size,
        packed=nbytes(parts.packed),
        constants=nbytes(parts.constants),
        dense=nbytes(parts.dense),
        adapters=nbytes(parts.adapters),
        gradients=nbytes(trains),
        states=states,
        state=state,
        plain=step(False),
        checkpointed=step(True) if model.supports_gradient_checkpointing else None,
        gathered=2 * max(map(nbytes, in_blocks), default=0) + outside,
        stored=parts,
        optimizer=cfg.optim.name,
    )


def _state_bytes(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> int:
    """Bytes on the device of the optimizer's state, without pages. Beside it there is a number of steps on the host."""
    layouts = (optimizer.state_layout(p, p.numel()).values() for p in params)
    return sum(n * dtype.itemsize for layout in layouts for dtype, n in layout)


def check_gpus(budget: Budget, gpus: int, linears: dict[str, nn.Module]) -> None:
    """UserError: more GPUs than the smallest linear has rows to share among them."""
    name, linear = min(linears.items(), key=lambda item: weight_shape(item[1])[0])
    rows = weight_shape(linear)[0]
    if gpus > rows:
        raise UserError(f"gpus={gpus}: {name} has {rows} rows, so shards of it make sense on {rows} GPUs at most")
