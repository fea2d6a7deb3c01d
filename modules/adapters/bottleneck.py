"""Houlsby's adapter: a small network with a skip connection behind a frozen linear.

    h = base(x),   y = h + gelu(h·Dᵀ + b_D)·Uᵀ + b_U           D [r, d], U [d, r]; 2dr + r + d parameters

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, §2.1: one behind the attention and one behind the MLP of each
block, before the residual addition. The paper trains the LayerNorms too; the LoRA paper (§5.1, Adapter_H) counts
adapters alone, and so it is here: `modules_to_save` names the norms if they are to train.

state_dict keys: base.*, adapter_down [r, d], adapter_down_bias [r], adapter_up [d, r], adapter_up_bias [d].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.linear import weight_shape


class BottleneckLinear(nn.Module):
    """The adapter over `base`, an nn.Linear, Conv1D or NF4Linear with d outputs, which is frozen.

    Args:
        rank: r, 1 or more: the width of the bottleneck.

    D starts as in the paper, normal with standard deviation 0.01 truncated at two of them. U and both biases start at
    zero, so that the layer starts as its base, where the paper's is only near it. All are fp32.
    """

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base, self.rank = base.requires_grad_(False), rank
        d, like = weight_shape(base)[0], {"dtype": torch.float32, "device": base.weight.device}
        self.adapter_down = nn.Parameter(torch.empty(rank, d, **like))
        self.adapter_down_bias = nn.Parameter(torch.zeros(rank, **like))
        self.adapter_up = nn.Parameter(torch.zeros(d, rank, **like))
        self.adapter_up_bias = nn.Parameter(torch.zeros(d, **like))
        nn.init.trunc_normal_(self.adapter_down, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        down, down_bias, up, up_bias = (parameter.to(h.dtype) for parameter in self.own_parameters().values())
        return h + F.linear(F.gelu(F.linear(h, down, down_bias)), up, up_bias)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those beside the base's: what trains and what is saved."""
        names = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")
        return {name: getattr(self, name) for name in names}

    def set_base(self, base: nn.Module) -> None:
        """Put another base of the same shape under the adapter."""
        self.base = base.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"
