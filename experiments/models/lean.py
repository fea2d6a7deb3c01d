"""Parts of a transformers model computed on a CPU with fewer passes, and less kept for backward.

    RMSNorm     y = w ⊙ x · rsqrt(mean x² + ε)           keeps x as it came; eager PyTorch keeps it in fp32
    gated MLP   down(act(gate(x)) ⊙ up(x))               keeps gate(x) and up(x); their product is computed again

Results are those of the model's own code but for a rounding to its dtype here and there, or a module is left as it is:
what it does to random numbers is compared first. In bf16 one kernel does what lies between two products
(kernels/cpu/). Attention and rotary embedding have files of their own (attention.py, rotary.py).
"""

from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from experiments.models import attention, rotary
from kernels import cpu
from modules import NF4Linear


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if cpu.takes(x, weight):
            y, scale = cpu.norms.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return y
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, scale = ctx.saved_tensors
        if cpu.takes(dy, x, weight):
            return cpu.norms.rms_norm_backward(dy, x, weight, scale), None, None
        dx = (dy * weight).to(scale.dtype).mul_(scale)
        along = (dx * x).mean(-1, keepdim=True).mul_(scale.square())
        return dx.addcmul_(x, along, value=-1).to(x.dtype), None, None


class _Product:
    """act(gate) ⊙ up. Backward computes it again, and its activation once for two that need it one after the other."""

    def __init__(self, act: nn.Module):
        self.act = act
        self.is_silu = type(act) in (nn.SiLU, SiLUActivation)
        self.activated: tuple[Tensor, Tensor] | None = None  # a leaf, and what act makes of it

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return cpu.elementwise.swiglu(gate, up) if self._kernel_takes(gate, up) else self.act(gate) * up

    @torch.no_grad()
    def again(self, gate: Tensor, up: Tensor) -> Tensor:
        return self(gate, up) if self._kernel_takes(gate, up) else self._activate(gate)[1] * up

    def backward(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if self._kernel_takes(dy, gate, up):
            return cpu.elementwise.swiglu_backward(dy, gate, up)
        leaf, activated = self._activate(gate)
        self.activated = None
        (dgate,) = torch.autograd.grad(activated, leaf, dy * up)
        return dgate, dy * activated.detach()

    def _kernel_takes(self, *tensors: Tensor) -> bool:
        return self.is_silu and cpu.takes(*tensors)

    def _activate(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        if self.activated is None:
            with torch.enable_grad():
                leaf = gate.detach().requires_grad_()
                self.activated = leaf, self.act(leaf)
        return self.activated


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, product: _Product) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.product = product
        return product(gate, up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return *ctx.product.backward(dy, *ctx.saved_tensors), None


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, self.weight, _eps(self))


def _mlp(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    product = _Product(self.act_fn)
    hidden = _Gated.apply(gate, up, product)
    address, size = hidden.data_ptr(), hidden.numel()  # not `hidden`: the hooks would keep it

    def keep(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if (saved.data_ptr(), saved.numel()) == (address, size) else saved

    def restore(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else product.again(gate, up).view(kept)

    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # checkpointing keeps none of them
        return self.down_proj(hidden)
    with torch.autograd.graph.saved_tensors_hooks(keep, restore):
        return self.down_proj(hidden)


def _rms_norm_or_own(self: nn.Module, hidden_states: Tensor) -> Tensor:
    ours = hidden_states.is_cpu and not self.weight.requires_grad and not torch.compiler.is_compiling()
    return _rms_norm(self, hidden_states) if ours else type(self).forward(self, hidden_states)


def _mlp_or_own(self: nn.Module, x: Tensor) -> Tensor:
    return _mlp(self, x) if x.is_cpu and not torch.compiler.is_compiling() else type(self).forward(self, x)


def _is_rms_norm(module: nn.Module) -> bool:
    named = type(module).__name__.endswith("RMSNorm")
    return named and isinstance(getattr(module, "weight", None), Tensor) and isinstance(_eps(module), float)


def _is_mlp(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(part) in (nn.Linear, NF4Linear) for part in parts) and isinstance(
        getattr(module, "act_fn", None), nn.Module
    )


def _input_of(module: nn.Module) -> Tensor:
    """Zeros [1, 3, features] as the module takes them."""
    if _is_rms_norm(module):
        return module.weight.new_zeros(1, 3, module.weight.numel())
    gate = module.gate_proj
    dtype = gate.dtype if isinstance(gate, NF4Linear) else gate.weight.dtype
    return torch.zeros(1, 3, gate.in_features, dtype=dtype)


@torch.no_grad()
def _computes_the_same(module: nn.Module, forward) -> bool:
    x = _input_of(module).normal_(generator=torch.Generator().manual_seed(0))
    try:
        own, ours = module(x), forward(module, x)
        return bool((own - ours).abs().max() <= torch.finfo(own.dtype).eps * own.abs().max())
    except (TypeError, RuntimeError):  # takes or does something else
        return False


def use_on_cpu(model: PreTrainedModel) -> None:
    """Have `model`, while it is on a CPU, compute norms, gated MLPs, attention and rotary embedding here if it can."""
    attention.use_on_cpu(model)
    rotary.use_on_cpu(model)
    for module in model.modules():
        if _is_rms_norm(module) and _computes_the_same(module, _rms_norm):
            module.forward = MethodType(_rms_norm_or_own, module)
        elif _is_mlp(module) and _computes_the_same(module, _mlp):
            module.forward = MethodType(_mlp_or_own, module)
