"""A model's RMSNorm by the op rms_norm, which keeps x as it came. Eager PyTorch keeps it in fp32."""

import torch
from torch import Tensor, nn

import kernels
from modules.fused.module import Fused, can_be_replaced, computes_the_same


class FusedRMSNorm(Fused):
    """y = w ⊙ x · rsqrt(mean x² + ε)"""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.own_forward(x)
        return kernels.rms_norm(x, self.weight, _eps(self))


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def fused_rms_norm(module: nn.Module) -> FusedRMSNorm | None:
    """The replacement of `module`; None if it is not such a norm."""
    named = type(module).__name__.endswith("RMSNorm") and not isinstance(module, Fused)
    if not named or not isinstance(getattr(module, "weight", None), Tensor) or not isinstance(_eps(module), float):
        return None

    def parts(dtype: torch.dtype) -> tuple[dict, dict, Tensor]:
        n = module.weight.numel()
        return {"weight": nn.Parameter(torch.randn(n, dtype=dtype))}, {}, torch.randn(1, 3, n, dtype=dtype)

    same = can_be_replaced(module) and computes_the_same(FusedRMSNorm, module, parts)
    return FusedRMSNorm(module) if same else None
