"""The linears: a frozen base, dense or NF4, with or without an adapter.

state_dict keys
    NF4Linear    weight (uint8 codes), absmax, nested_absmax, nested_offset (with double quantization), bias
    LoRALinear   base.*, lora_A [rank, in], lora_B [out, rank]
    DoRALinear   the same and magnitude [out]
"""

import math

import torch
from torch import Tensor, nn

import kernels
from kernels import QuantState


class NF4Linear(nn.Module):
    """A frozen linear whose weight [out, in] is packed in NF4.

    Args:
        packed: uint8 codes and `quant_state`, as `kernels.quantize_4bit` returns them.
        bias: [out] or None; kept as it is.
    """

    def __init__(self, packed: Tensor, quant_state: QuantState, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = quant_state.shape
        self.dtype, self.blocksize = quant_state.dtype, quant_state.blocksize
        self.register_buffer("weight", packed)
        self.register_buffer("absmax", quant_state.absmax)
        self.register_buffer("nested_absmax", quant_state.nested_absmax)
        self.register_buffer("nested_offset", quant_state.nested_offset)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True) -> "NF4Linear":
        packed, quant_state = kernels.quantize_4bit(linear.weight, blocksize, double_quant)
        return cls(packed, quant_state, linear.bias)

    @property
    def quant_state(self) -> QuantState:
        shape = torch.Size((self.out_features, self.in_features))
        return QuantState(self.absmax, shape, self.dtype, self.blocksize, self.nested_absmax, self.nested_offset)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.nf4_linear(x, self.weight, self.quant_state, self.bias)

    def dense_weight(self) -> Tensor:
        """The weight [out, in] that the codes stand for, in the dtype it had."""
        return kernels.dequantize_4bit(self.weight, self.quant_state)

    def _apply(self, fn, recurse=True):
        # .to(dtype) changes the dtype to compute in. The constants stay fp32, or the codes would mean other weights.
        constants = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, buffer in constants.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        double = ", double_quant" if self.nested_absmax is not None else ""
        return (
            f"{self.in_features}, {self.out_features}, blocksize={self.blocksize}{double}, bias={self.bias is not None}"
        )


class LoRALinear(nn.Module):
    """y = xWᵀ + s·(drop(x)Aᵀ)Bᵀ + bias over a frozen base. LoRA, Hu et al. 2021.

    Args:
        base: nn.Linear or NF4Linear; it is frozen.
        rank: 1 … min(in, out).
        lora_alpha: s = lora_alpha / rank.
        dropout: on the adapter's input, in training mode.

    A starts as Kaiming-uniform(√5), B at zero; both are fp32 whatever the base computes in.

    Raises:
        ValueError: a rank out of range.
    """

    def __init__(self, base: nn.Linear | NF4Linear, rank: int, lora_alpha: float, dropout: float = 0.0):
        super().__init__()
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise ValueError(
                f"rank {rank} is out of range for a layer of {base.in_features} × {base.out_features}: "
                f"choose 1 to {min(base.in_features, base.out_features)}"
            )
        self.base = base.requires_grad_(False)
        self.rank, self.lora_alpha, self.dropout = rank, lora_alpha, dropout
        self.scaling = lora_alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def quant_state(self) -> QuantState | None:
        return self.base.quant_state if isinstance(self.base, NF4Linear) else None

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return kernels.lora_linear(
            x, self.base.weight, self.lora_A, self.lora_B, self.scaling, self.base.bias, self.quant_state, dropout
        )

    def base_weight(self) -> Tensor:
        """The base weight [out, in], dense, in the dtype it computes in."""
        return self.base.dense_weight() if isinstance(self.base, NF4Linear) else self.base.weight

    def merged_weight(self) -> Tensor:
        """W + s·BA [out, in], added in fp32 and rounded once to the base's dtype."""
        w = self.base_weight()
        return (w.float() + self.scaling * self.lora_B @ self.lora_A).to(w.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A dense nn.Linear that computes what this layer does in evaluation mode."""
        weight = self.merged_weight()
        bias = self.base.bias
        merged = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        merged.weight.copy_(weight)
        if bias is not None:
            merged.bias.copy_(bias)
        return merged.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, lora_alpha={self.lora_alpha}, dropout={self.dropout}"


class DoRALinear(LoRALinear):
    """y = m/‖W + sBA‖ ⊙ (xWᵀ + s·(xAᵀ)Bᵀ) + bias, the norm taken per row. DoRA, Liu et al. 2024.

    The magnitude m starts as ‖W‖, so that the layer starts as its base. Arguments as LoRALinear's.

    In evaluation mode the norm is computed once for each version of A and B. In training mode it is computed in every
    forward: an optimizer that writes through `.data`, or FSDP's gathering, changes A without changing its version.
    """

    def __init__(self, base: nn.Linear | NF4Linear, rank: int, lora_alpha: float, dropout: float = 0.0):
        super().__init__(base, rank, lora_alpha, dropout)
        norm_sq = kernels.weight_norm_sq(base.weight.detach(), self.quant_state)
        self.register_buffer("norm_sq", norm_sq, persistent=False)
        self.magnitude = nn.Parameter(norm_sq.sqrt())
        self._cached_norm: tuple[tuple, Tensor] | None = None  # what it was computed from, and the norm

    def train(self, mode: bool = True) -> "DoRALinear":
        self._cached_norm = None
        return super().train(mode)

    def _norm(self) -> Tensor | None:
        """‖W + sBA‖ [out] if it may be taken from an earlier forward."""
        if self.training or torch.compiler.is_compiling():
            return None
        inputs = (self.base.weight, self.norm_sq, self.lora_A, self.lora_B)
        key = (self.scaling, *((tensor.data_ptr(), tensor._version) for tensor in inputs))
        if self._cached_norm is None or self._cached_norm[0] != key:
            args = (self.base.weight, self.norm_sq, self.lora_A, self.lora_B, self.scaling, self.quant_state)
            self._cached_norm = key, kernels.dora_norm(*args)
        return self._cached_norm[1]

    def forward(self, x: Tensor) -> Tensor:
        return kernels.dora_linear(
            x,
            self.base.weight,
            self.norm_sq,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            self.scaling,
            self.base.bias,
            self.quant_state,
            self.dropout if self.training else 0.0,
            norm=self._norm(),
        )

    def merged_weight(self) -> Tensor:
        """m/‖W + sBA‖ ⊙ (W + sBA) [out, in], computed in fp32 and rounded once to the base's dtype."""
        w = self.base_weight()
        v = w.float() + self.scaling * self.lora_B @ self.lora_A
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (self.magnitude.unsqueeze(1) / norm * v).to(w.dtype)
