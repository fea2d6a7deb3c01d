"""Mixtures of experts in a model: modules in the place of the weights of experts, and the code that uses them.

transformers keeps the experts of a layer as parameters of three dimensions. `take_over_experts` puts an ExpertsLinear
in the place of each such parameter, and has the layer compute with the ops of kernels/experts.py: the tokens are sorted
by expert once, and each linear takes them so. `give_back_experts` undoes it.
"""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import kernels
from modules.experts import ExpertsLinear
from modules.parts import in_parts

SILU = ("SiLU", "SiLUActivation")  # torch's and transformers'
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
IN_OUT = ("Llama4TextExperts",)  # classes that keep weights as [experts, in, out] and do not say so


class _OfModules(nn.Module):
    """The code of a layer's experts whose weights are modules, before the own class among the bases of its class."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in PROJECTIONS:
            if name in self._modules:
                for key, new in ((name, f"{name}.weight"), (f"{name}_bias", f"{name}.bias")):
                    if prefix + key in state_dict:
                        state_dict[prefix + new] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Experts(_OfModules):
    """Experts as transformers marks them (`use_experts_implementation`)."""

    tokens: int | None = None  # to compute at a time; None: all

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ over the experts of each token of weight · expert(token).

        Args:
            hidden_states: [T, hidden].
            top_k_index: int64 [T, k], the experts of each token. A number that no expert has adds nothing.
            top_k_weights: [T, k].

        Returns:
            [T, hidden] in the dtype of `hidden_states`.
        """
        tensors = hidden_states, top_k_index, top_k_weights
        return self._rows(*tensors) if self.tokens is None else in_parts(self._rows, tensors, self.tokens)

    def _rows(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        order, ends = kernels.route(top_k_index, self.num_experts)
        x = kernels.gather(hidden_states, order, top_k_index.shape[-1])
        if self.has_gate:
            h = self._gated(self.gate_up_proj(x, ends))
        else:
            h = self.act_fn(self.up_proj(x, ends))
        y = self.down_proj(h, ends)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        return kernels.combine(y, order, top_k_weights).to(hidden_states.dtype)

    def _gated(self, gate_up: Tensor) -> Tensor:
        default = self._apply_gate.__name__ == "_default_apply_gate"  # transformers': act(gate) · up
        if default and type(self.act_fn).__name__ in SILU:
            return kernels.swiglu(*gate_up.chunk(2, dim=-1))
        return self._apply_gate(gate_up)


class AllExperts(_OfModules):
    """Experts of Llama 4, which shows every token to every expert, scaled by a gate that is often zero."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.shape[0] // self.num_experts
        ends = torch.arange(1, self.num_experts + 1, dtype=torch.int32, device=hidden_states.device) * rows
        gate, up = self.gate_up_proj(hidden_states, ends).chunk(2, dim=-1)
        return self.down_proj(up * self.act_fn(gate), ends)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The full names and modules of `model` whose experts can be taken over, or are already."""
    for name, module in model.named_modules():
        if isinstance(module, _OfModules) or _is_known(module):
            yield name, module


def _is_known(module: nn.Module) -> bool:
    """True for classes that transformers marks as experts, and for Llama 4's."""
    marked = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    return (marked or type(module).__name__ in IN_OUT) and any(
        name in PROJECTIONS and parameter is not None and parameter.dim() == 3
        for name, parameter in module._parameters.items()
    )


@functools.cache
def _with_modules(own: type[nn.Module]) -> type[nn.Module]:
    code = AllExperts if own.__name__ in IN_OUT else Experts
    return type(own.__name__, (code, own), {"own_class": own, "__module__": own.__module__})


def experts_weights(model: nn.Module) -> list[str]:
    """The full names of the parameters of `model` that `take_over_experts` puts an ExpertsLinear in the place of."""
    return [
        f"{path}.{name}"
        for path, module in experts_modules(model)
        for name in PROJECTIONS
        if module._parameters.get(name) is not None
    ]


def take_over_experts(model: nn.Module) -> None:
    """Put an ExpertsLinear in the place of every parameter of `model` that holds the weights of several experts."""
    for _, module in list(experts_modules(model)):
        if not isinstance(module, _OfModules):
            _take_over(module)


def _take_over(module: nn.Module) -> None:
    in_out = type(module).__name__ in IN_OUT or module.is_transposed
    for name in PROJECTIONS:
        weight = module._parameters.pop(name, None)
        if weight is None:
            continue
        bias = module._parameters.pop(f"{name}_bias", None)
        if in_out:
            weight.data = weight.data.transpose(1, 2).contiguous()
        linear = ExpertsLinear(weight, bias, in_out)
        module.add_module(name, linear.train(module.training))
    module.__class__ = _with_modules(type(module))


def give_back_experts(model: nn.Module) -> None:
    """Undo `take_over_experts` for each layer whose experts are all dense and have no adapter."""
    for _, module in list(experts_modules(model)):
        if isinstance(module, _OfModules):
            linears = {name: module._modules[name] for name in PROJECTIONS if name in module._modules}
            if all(isinstance(linear, ExpertsLinear) for linear in linears.values()):
                _give_back(module, linears)


def _give_back(module: nn.Module, linears: dict[str, ExpertsLinear]) -> None:
    module.__class__ = module.own_class
    for name, linear in linears.items():
        del module._modules[name]
        if linear.in_out:
            linear.weight.data = linear.own_weight().detach()
        module.register_parameter(name, linear.weight)
        if linear.bias is not None:
            module.register_parameter(f"{name}_bias", linear.bias)


@torch.no_grad()
def reached_experts(model: nn.Module, batches: Iterable[dict]) -> dict[str, list[int]]:
    """The numbers of the experts that have a token of `batches`, by the full name of the module of the experts.

    A module that no token comes to has none.

    Args:
        batches: dicts of keyword arguments of `model`, whose experts are taken over. Tokens whose `attention_mask` is 0
            do not count.
    """
    modules = dict(experts_modules(model))
    found: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def see(name: str, module: nn.Module, args: tuple) -> None:
        if isinstance(module, AllExperts):
            tokens = args[0].view(module.num_experts, -1, args[0].shape[-1]).any(dim=2)
            counted = tokens if mask is None else tokens & mask.flatten()
            hit = counted.any(dim=1)
        else:
            index = args[1] if mask is None else args[1][mask.flatten()]
            hit = torch.zeros(module.num_experts + 1, dtype=torch.bool, device=index.device)
            hit[index.flatten().clamp(max=module.num_experts)] = True
        found[name] = found.get(name, False) | hit[: module.num_experts]

    training = model.training
    model.eval()
    hooks = [module.register_forward_pre_hook(functools.partial(see, name)) for name, module in modules.items()]
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return {name: found[name].nonzero().flatten().tolist() if name in found else [] for name in modules}
