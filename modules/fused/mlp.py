"""A model's gated MLP, down(act(gate(x)) ⊙ up(x)), of which backward keeps gate(x) and up(x) alone.

The product is the op swiglu if the activation is SiLU. It is also the input of `down`, which keeps it for the gradient
of its weight or adapter: a hook keeps its shape instead, and computes it again.
"""

import torch
from torch import Tensor, nn

import kernels
from modules.fused.joined import joined
from modules.fused.module import Fused, can_be_replaced, computes_the_same
from modules.mixtures import SILU

LINEARS = ("gate_proj", "up_proj", "down_proj")


class FusedMLP(Fused):
    """down_proj(act_fn(gate_proj(x)) ⊙ up_proj(x))"""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.own_forward(x)
        gate, up = joined((self.gate_proj, self.up_proj), x) or (self.gate_proj(x), self.up_proj(x))
        hidden = self._product(gate, up)
        # Checkpointing keeps no tensors of a block. A hook inside it would keep gate and up of every block.
        checkpointing = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if checkpointing or not torch.is_grad_enabled():
            return self.down_proj(hidden)
        address, size = hidden.data_ptr(), hidden.numel()  # not `hidden`: the hooks would keep it

        def keep(saved: Tensor) -> Tensor | torch.Size:
            return saved.shape if (saved.data_ptr(), saved.numel()) == (address, size) else saved

        def restore(kept: Tensor | torch.Size) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad():
                return self._product(gate, up).view(kept)

        with torch.autograd.graph.saved_tensors_hooks(keep, restore):
            return self.down_proj(hidden)

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        if type(self.act_fn).__name__ in SILU:
            return kernels.swiglu(gate, up)
        return _Gated.apply(gate, up, self.act_fn)


class _Gated(torch.autograd.Function):
    """act(gate) ⊙ up. Keeps gate and up; backward computes act(gate) again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.act(leaf)
        (dgate,) = torch.autograd.grad(activated, leaf, dy * up)
        return dgate, dy * activated.detach(), None


def fused_mlp(module: nn.Module) -> FusedMLP | None:
    """The replacement of `module`; None if it is not such an MLP."""
    if isinstance(module, Fused) or set(module._modules) != {*LINEARS, "act_fn"}:
        return None
    same = can_be_replaced(module) and computes_the_same(FusedMLP, module, _parts)
    return FusedMLP(module) if same else None


def _parts(dtype: torch.dtype) -> tuple[dict, dict, Tensor]:
    sizes = (8, 16), (8, 16), (16, 8)
    linears = {name: nn.Linear(*size, bias=False, dtype=dtype) for name, size in zip(LINEARS, sizes)}
    return {}, linears, torch.randn(1, 3, 8, dtype=dtype)
