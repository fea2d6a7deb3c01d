"""Houlsby's adapter: a small network with a skip connection behind a frozen linear.

    h = base(x),   y = h + gelu(h·Dᵀ + b_D)·Uᵀ + b_U           D [r, d], U [d, r]; 2dr + r + d parameters

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, §2.1: each block has one behind its attention and one behind its
MLP, before the residual addition. The paper trains the LayerNorms too. Here, as in the LoRA paper (§5.1, Adapter_H),
the adapters alone train. To train the norms too, name them in `modules_to_save`.

state_dict keys: base.*, adapter_down [r, d], adapter_down_bias [r], adapter_up [d, r], adapter_up_bias [d].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.linear import weight_shape


class BottleneckLinear(nn.Module):
    """Houlsby's adapter behind a frozen base with d outputs.

    Args:
        base: nn.Linear, Conv1D or NF4Linear. It is frozen.
        rank: r, the width of the bottleneck, 1 or more.

    D starts as in the paper: normal with standard deviation 0.01, truncated at ±0.02. U and both biases start at zero,
    so the layer starts exactly as its base; the paper's starts near it. All four are fp32.
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
        """The parameters that train and are saved, by name. The base's are not among them."""
        names = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")
        return {name: getattr(self, name) for name in names}

    def set_base(self, base: nn.Module) -> None:
        """Put another base of the same shape under the adapter."""
        self.base = base.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"
