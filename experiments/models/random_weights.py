"""Random weights for a model on the meta device, made on a device, a module at a time.

A weight is a function of the seed, its name and its place alone, in integers: the same bits come on every device. It is
the sum of four uniform numbers, which is near a normal one.

This file imports nothing of the project: the benchmark runs it in the processes of others too.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 2**22  # weights made at a time, in 8 bytes each: near what caches hold
STEP, FIRST, SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
MEAN, DEVIATION = 2 * 65535, math.sqrt((65536**2 - 1) / 3)  # of four numbers of 16 bits


def random_weight(
    name: str, shape: torch.Size, std: float, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Near-normal numbers with mean 0. Each hashes its index as splitmix64 does (Steele et al. 2014)."""
    weight = torch.empty(shape, dtype=dtype, device=device)
    flat = weight.view(-1)
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little", signed=True)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        x = torch.arange(start, start + part.numel(), device=device).mul_(STEP).add_(key)
        x = x.bitwise_xor_(_shifted(x, 30)).mul_(FIRST)
        x = x.bitwise_xor_(_shifted(x, 27)).mul_(SECOND)
        x = x.bitwise_xor_(_shifted(x, 31))
        total = x & 0xFFFF
        for shift in (16, 32, 48):
            total += (x >> shift).bitwise_and_(0xFFFF)
        part.copy_((total - MEAN).float().mul_(std / DEVIATION))
    return weight


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, with zeros from the left."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


@torch.no_grad()
def fill(
    model: PreTrainedModel, device: torch.device, seed: int, pack: Callable[[str, nn.Module], None] | None = None
) -> None:
    """Give `model`, which is on the meta device, weights on `device`, in place.

    Weights of two and more dimensions are random. Everything else (norms, biases, rotary frequencies) is as
    transformers begins with it.

    Args:
        pack: is called with the name of each module and the module, as soon as it has its weights.
    """
    config = model.config.get_text_config()
    std = getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02
    made: dict[int, nn.Parameter] = {}  # by the parameter in its place: tied ones stay tied
    modules = list(model.named_modules())
    owners: dict[str, PreTrainedModel] = {name: module for name, module in modules if hasattr(module, "_init_weights")}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # what transformers draws beside: nothing in most models
        for name, module in modules:
            for own, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    full = f"{name}.{own}".lstrip(".")
                    made[id(parameter)] = _made(parameter, full, std, seed, device)
                module._parameters[own] = made[id(parameter)]
            for own, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[own] = torch.empty_like(buffer, device=device)
            if module._buffers or any(p is not None and p.ndim < 2 for p in module._parameters.values()):
                owner = max((o for o in owners if o == "" or f"{name}.".startswith(f"{o}.")), key=len)
                owners[owner]._init_weights(module)
            if pack is not None:
                pack(name, module)
    model.tie_weights()


def _made(parameter: nn.Parameter, name: str, std: float, seed: int, device: torch.device) -> nn.Parameter:
    if parameter.ndim < 2:
        return nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
    weight = random_weight(name, parameter.shape, std, seed, parameter.dtype, device)
    made = nn.Parameter(weight, parameter.requires_grad)
    made._is_hf_initialized = True  # transformers leaves it as it is
    return made
