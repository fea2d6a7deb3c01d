"""How A and B are initialised. W [out, in] is the base weight, s the scaling, r the rank.

    default       A Kaiming-uniform(√5), B = 0. Hu et al. 2021
    gaussian      A ~ N(0, 1/r²), B = 0
    orthogonal    A and B are not zero, but BA is: B is made from the even rows of a random rotation, A from the odd
                  ones. https://datta0.github.io/posts/rethink-lora-init
    pissa         s·BA = the r principal components of W. Meng et al. 2024. pissa_niter_N computes them by N subspace
                  iterations from a random start: faster and nearly as exact
    olora         B = the first r columns of Q and A = the first r rows of R, QR = W. Büyükakyüz 2024
    loftq         s·BA = the r principal components of the error of `quantize` on W. Li et al. 2023, one iteration: the
                  base is the plain packed W. Attach first, then quantize
    loftq_iter_N  the same with N iterations. Each iteration packs W − BA anew, so the base differs from the plain
                  packed W (`modules/adapters/quantized_init.py`)
    qpissa        quantized PiSSA: the same iterations, starting from the r principal components of W. Meng et al. 2024,
                  §4. Five iterations; qpissa_iter_N has N
    eva           A = the r principal components of the layer's input on calibration batches, B = 0.
                  Paischer et al. 2024, with the same rank in every layer (ρ = 1)

They are PEFT's initialisations of the same names, with three differences:
    PiSSA and OLoRA: PEFT subtracts BA from W. Here W stays and the layer keeps the start A₀, B₀ (see `LoRALinear`).
        So adapters can be switched and detached, and an exact LoRA of rank 2r stands for them over NF4 too.
    LoftQ: the scaling s is taken into account.
    EVA: ranks are not moved between layers.

An adapter of qpissa or loftq_iter_N is a plain LoRA over a base of its own: keep the two together.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from modules.adapters.config import quantized_start
from modules.adapters.decompose import OVERSAMPLING, decompose
from modules.adapters.quantized_init import quantized_init
from modules.experts import is_experts
from modules.linear import LoRALinear, NF4Linear, dense_weight, is_conv1d


@torch.no_grad()
def initialise(layer: LoRALinear, init: str) -> None:
    """Initialise A and B of a new `layer`.

    loftq, qpissa and eva start as default: `pack` sets A and B later for the first two, `attach` for eva.
    """
    if init == "gaussian":
        nn.init.normal_(layer.lora_A, std=1 / layer.rank)
    elif init == "orthogonal":
        layer.start_at(*_orthogonal(layer))
    elif init.startswith("pissa"):
        _, _, niter = init.partition("_niter_")
        how = {"method": "randomized", "niter": int(niter)} if niter else {}
        lora_A, lora_B = _of_each(_weight(layer), lambda w: decompose(w, layer.rank, **how))
        layer.start_at(lora_A / layer.scaling**0.5, lora_B / layer.scaling**0.5, part_of_weight=True)
    elif init == "olora":
        q, r = torch.linalg.qr(_weight(layer).float())
        layer.start_at(r[..., : layer.rank, :], q[..., : layer.rank], part_of_weight=True)


def _weight(layer: LoRALinear) -> Tensor:
    """The base's weight; of experts those that have an adapter."""
    weight, chosen = dense_weight(layer.base), getattr(layer, "chosen", None)
    return weight if chosen is None else weight[chosen]


def _of_each(weight: Tensor, factors: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A and B that `factors` makes of a weight [out, in]; for [experts, out, in] those of each expert, stacked."""
    if weight.dim() == 2:
        return factors(weight)
    lora_A, lora_B = zip(*(factors(expert) for expert in weight))
    return torch.stack(lora_A), torch.stack(lora_B)


def _orthogonal(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    (*experts, out_features, _), (*_, rank, in_features) = layer.lora_B.shape, layer.lora_A.shape
    device = layer.lora_A.device
    q, _ = torch.linalg.qr(torch.randn(*experts, rank, rank, device=device))
    lora_A = q[..., 0::2, :].mT @ torch.randn(*experts, rank // 2, in_features, device=device)
    lora_B = torch.randn(*experts, out_features, rank // 2, device=device) @ q[..., 1::2, :]
    return lora_A / 10, lora_B / 10


@torch.no_grad()
def pack(
    layer: LoRALinear, init: str, linear: nn.Module, blocksize: int, double_quant: bool, quant_type: str
) -> NF4Linear:
    """Pack the dense `linear` as the base of a new `layer`, and set A and B to compensate for the error of packing.

    Args:
        init: loftq, qpissa, or one of them with _iter_N.
        blocksize, double_quant, quant_type: see `kernels.quantize_4bit`.
    """
    start, iterations = quantized_start(init)
    method = "svd" if iterations == 1 else "randomized"
    how = (blocksize, double_quant, quant_type, method)
    found = quantized_init(dense_weight(linear), layer.rank, start, iterations, *how)
    layer.start_at(found.lora_A / layer.scaling**0.5, found.lora_B / layer.scaling**0.5)
    return NF4Linear(found.packed, found.quant_state, linear.bias, is_conv1d(linear))


@torch.no_grad()
def principal_inputs(model: nn.Module, ranks: dict[str, int], batches: Iterable[dict]) -> dict[str, Tensor]:
    """The principal components of the inputs of linears, fp32 [rank, in] each, by the linear's full name.

    Args:
        ranks: the number of components, by the linear's full name.
        batches: dicts of keyword arguments of the model. Tokens whose `attention_mask` is 0 do not count.

    Raises:
        ValueError: there are fewer tokens than components.
    """
    inputs = {name: _Components(rank) for name, rank in ranks.items()}
    mask: Tensor | None = None
    last: tuple[Tensor, str] | None = None

    def see(name: str):
        def hook(_, args):
            nonlocal last
            x = args[0]
            if last is not None and x is last[0] and ranks[name] == ranks[last[1]]:  # k_proj reads q_proj's input
                inputs[name] = inputs[last[1]]
                return
            last = x, name
            x = x.flatten(0, -2).float()
            inputs[name].add(x[mask.flatten()] if mask is not None and len(x) == mask.numel() else x)

        return hook

    training = model.training
    model.eval()
    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in ranks]
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return {name: components.result(name) for name, components in inputs.items()}


class _Components:
    """Incremental principal component analysis (Ross et al. 2008), which keeps a few directions of all rows seen."""

    def __init__(self, rank: int):
        self.rank, self.rows = rank, 0
        self.mean: Tensor | None = None
        self.scaled: Tensor | None = None  # [rank + OVERSAMPLING, in]: directions times singular values

    def add(self, x: Tensor) -> None:
        """Update the components with the rows of x [rows, in]."""
        mean, rows = x.mean(dim=0), x.shape[0]
        x = x - mean
        if self.scaled is not None:
            shift = (self.mean - mean) * (self.rows * rows / (self.rows + rows)) ** 0.5
            x = torch.cat([self.scaled, x, shift[None]])
            mean = (self.rows * self.mean + rows * mean) / (self.rows + rows)
        root, _ = decompose(x, min(self.rank + OVERSAMPLING, *x.shape), "randomized")
        self.scaled = root * root.norm(dim=1, keepdim=True)
        self.mean, self.rows = mean, self.rows + rows

    def result(self, name: str) -> Tensor:
        """The components [rank, in]; `name` is the linear's, for the message."""
        if self.scaled is None or self.scaled.shape[0] < self.rank:
            raise ValueError(f"init=eva needs {self.rank} calibration tokens or more; {name} saw {self.rows}")
        return nn.functional.normalize(self.scaled[: self.rank], dim=1)


def check_init(init: str, bases: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if `init` needs dense bases, and they are packed; or experts are among them, and it is not for
    experts.

    Args:
        bases: the linears that get an adapter, by full name.
    """
    if quantized_start(init) and any(isinstance(base, NF4Linear) for base in bases.values()):
        raise ValueError(f"init={init} needs the dense weights: attach the adapter before quantize(model)")
    experts = [name for name, base in bases.items() if is_experts(base)]
    if experts and (quantized_start(init) or init == "eva"):
        raise ValueError(
            f"init={init} is not for experts, and {experts[0]} has theirs: leave them out with "
            "exclude_modules=[experts], or choose default, gaussian, orthogonal, pissa or olora"
        )
