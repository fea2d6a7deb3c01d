"""How a model, its gradients and the state of its optimizer are spread over the processes of a run.

    Engine    one process has everything
    DDP       each has the model; gradients are averaged; each updates its share of the parameters, whose optimizer
              state it alone has, and sends them to the others (ZeRO stage 1, Rajbhandari et al. 2020)
    FSDP      each has a part of every tensor, of packed codes and quantization constants too, and gathers a block of
              the decoder when it computes (FSDP2, torch.distributed.fsdp.fully_shard)

All multiply the loss by the number of processes, since both torch's DDP and FSDP take the mean of the gradients. They
give whole tensors back: files are the same whatever the engine.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.config import Config
from experiments.errors import UserError
from experiments.system import parallel
from modules import NF4Linear


class Engine:
    """One process.

    Attributes:
        device: to compute on.
        loads_on: the device to load the model to; `place` does the rest.
    """

    def __init__(self, device: torch.device):
        self.device = self.loads_on = device

    def place(self, model: PreTrainedModel) -> None:
        """Spread the model, adapters included, over the processes."""

    def forward_of(self, forward: Callable) -> Callable:
        """The callable to train with in place of `forward`, which is the model or its compiled form."""
        return forward

    def accumulate(self, forward: Callable, last: bool) -> contextlib.AbstractContextManager:
        """Around a forward and backward pass; `last`: the last one before an update."""
        return contextlib.nullcontext()

    def update(self, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
        """Call `step`, which steps the optimizer, on gradients that are the same in all processes."""
        step()

    def whole(self, model: PreTrainedModel, everything: bool = False) -> contextlib.AbstractContextManager:
        """Inside, process 0 may read `model` as if it were alone: the trained parameters and a frozen A, or
        `everything`. Every process must enter."""
        return contextlib.nullcontext()

    def gather_state(self, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's state, by "parameter:key", of whole parameters, in process 0."""
        return state

    def own_state(self, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of the state of whole parameters that this process' optimizer holds."""
        return state

    def settle(self, model: PreTrainedModel) -> None:
        """Drop tensors that a forward pass gathered, so that the model has only the parameters that train."""

    @torch.no_grad()
    def set(self, parameter: Tensor, value: Tensor) -> None:
        """Give a parameter or buffer of a settled model the whole value."""
        parameter.copy_(value)


class DDP(Engine):
    def forward_of(self, forward: Callable) -> Callable:
        # find_unused_parameters: torch would else lay out its buckets anew after the first step, and the sums of a
        # resumed run would round differently
        parameters = {"find_unused_parameters": True, "forward_sync_buffers": False}
        return nn.parallel.DistributedDataParallel(forward, **parameters)

    def accumulate(self, forward: Callable, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else forward.no_sync()

    def update(self, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        owners = _owners(parameters)
        for parameter, owner in zip(parameters, owners):
            if owner != parallel.rank():
                parameter.grad = None  # without one the optimizer neither has state nor changes anything
        step()
        for owner in range(parallel.size()):
            _broadcast([p.detach() for p, of in zip(parameters, owners) if of == owner], owner)

    def gather_state(self, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = parallel.gather({name: tensor.cpu() for name, tensor in state.items()})
        return {name: tensor for part in parts for name, tensor in part.items()}

    def own_state(self, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        owner = dict(zip(parameters, _owners(list(parameters.values()))))
        return {name: t for name, t in state.items() if owner[name.rpartition(":")[0]] == parallel.rank()}


def _owners(parameters: list[Tensor]) -> list[int]:
    """The process that updates each parameter. Each gets neighbours with about the same number of elements."""
    whole = sum(p.numel() for p in parameters)
    before, owners = 0, []
    for p in parameters:
        owners.append((2 * before + p.numel()) * parallel.size() // (2 * whole))  # where its middle is
        before += p.numel()
    return owners


def _broadcast(tensors: list[Tensor], source: int) -> None:
    if tensors:
        flat = torch.cat([tensor.view(-1) for tensor in tensors])
        dist.broadcast(flat, source)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view(tensor.shape))


class FSDP(Engine):
    def __init__(self, device: torch.device):
        super().__init__(device)
        self.loads_on = torch.device("cpu")  # a block at a time goes to the device, and only this process' part stays

    def place(self, model: PreTrainedModel) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # here: importing it takes a second

        names = model._no_split_modules or ()
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        if not blocks:
            raise UserError(f"{type(model).__name__} names no blocks to shard it by: use trainer.parallel=ddp")
        mesh = init_device_mesh(self.device.type, (parallel.size(),))
        for module in [*blocks, model]:
            module.to(self.device)
            for linear in module.modules():
                if isinstance(linear, NF4Linear):
                    linear.hold_codes_as_parameters()
            fully_shard(module, mesh=mesh)  # no mixed precision: every tensor is gathered in the dtype it has
        model._is_fsdp_managed_module = True  # transformers' generate then lets no process end before the others

    @contextlib.contextmanager
    def whole(self, model: PreTrainedModel, everything: bool = False) -> Iterator[None]:
        self.settle(model)
        replaced, wholes = [], {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or not (everything or tensor.requires_grad or _of_adapter(name)):
                        continue
                    if id(tensor) not in wholes:  # tied weights stay tied
                        wholes[id(tensor)] = _whole(tensor)
                    replaced.append((tensors, name, tensor))
        for tensors, name, tensor in replaced:
            tensors[name] = wholes[id(tensor)]
        try:
            yield
        finally:
            for tensors, name, tensor in replaced:
                tensors[name] = tensor

    def gather_state(self, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        gathered = {}
        for name, tensor in state.items():
            like = parameters[name.rpartition(":")[0]]
            gathered[name] = _whole(_as_shard(tensor, like)) if tensor.shape == like.to_local().shape else tensor
        return gathered

    def own_state(self, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {}
        for name, tensor in state.items():
            like = parameters[name.rpartition(":")[0]]
            own[name] = _shard(tensor, like).to_local() if tensor.shape == like.shape else tensor
        return own

    def settle(self, model: PreTrainedModel) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def set(self, parameter: Tensor, value: Tensor) -> None:
        parameter.copy_(_shard(value, parameter) if hasattr(parameter, "to_local") else value)


def _of_adapter(name: str) -> bool:
    return name in ("lora_A", "init_A", "init_B")  # a frozen A, and where PiSSA and OLoRA began


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor: whole and on the CPU in process 0, unchanged elsewhere."""
    value = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        value = value.full_tensor()
    if not parallel.is_main():
        return tensor
    value = value.cpu()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _as_shard(local: Tensor, like: Tensor) -> Tensor:
    """`local` as this process' part of a tensor that is sharded as `like` is."""
    from torch.distributed.tensor import DTensor

    spread = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(local, like.device_mesh, like.placements, **spread)


def _shard(value: Tensor, like: Tensor) -> Tensor:
    """Shard `value`, which every process has whole, as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def engine_of(cfg: Config, device: torch.device) -> Engine:
    return {"one": Engine, "ddp": DDP, "fsdp": FSDP}[parallel.mode(cfg)](device)
