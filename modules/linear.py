"""Linears over a frozen base, which is dense or packed in NF4, with or without an adapter.

A dense base is nn.Linear or transformers' Conv1D, the linear of GPT-2, whose weight is [in, out]. Each adapted linear
has one adapter. `modules/adapters/attach.py` handles several named ones.

state_dict keys
    NF4Linear    weight (uint8 codes), absmax, bias; with double quantization also nested_absmax, nested_offset
    LoRALinear   base.*, lora_A [rank, in], lora_B [out, rank]; init_A, init_B if PiSSA or OLoRA set them;
                 bias [out] if it trains
    DoRALinear   the same and magnitude [out]
"""

import math
import sys

import torch
from torch import Tensor, nn

import kernels
from kernels import QuantState, Weight
from kernels.weight import check_packed, checked_before
from modules import seeds


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D."""
    source = sys.modules.get("transformers.pytorch_utils")  # a Conv1D exists only if this is imported already
    return source is not None and isinstance(module, source.Conv1D)


def weight_shape(linear: nn.Module) -> tuple[int, ...]:
    """(out, in) of an nn.Linear, NF4Linear or Conv1D; (experts, out, in) of the linears of experts."""
    if is_conv1d(linear):
        return linear.weight.shape[1], linear.weight.shape[0]
    shape = linear.out_features, linear.in_features
    return (linear.num_experts, *shape) if hasattr(linear, "num_experts") else shape


def weight_of(linear: nn.Module) -> Weight:
    """The weight [out, in] of an nn.Linear, NF4Linear or Conv1D, as ops take it; of experts [experts, out, in]."""
    if isinstance(linear, NF4Linear):
        return checked_before(linear.weight, linear.quant_state)
    return Weight(linear.weight.t() if is_conv1d(linear) else linear.weight)


def under_autocast(x: Tensor) -> bool:
    """True if torch.autocast casts the arguments of products with x."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def operands(x: Tensor, linear: nn.Module) -> tuple[Tensor, Weight]:
    """x and the weight of an nn.Linear, NF4Linear or Conv1D as ops take them: under autocast both in its dtype."""
    weight = weight_of(linear)
    if not under_autocast(x):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight if weight.packed else Weight(weight.values.to(dtype))


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight [out, in] of an nn.Linear, NF4Linear or Conv1D as a dense tensor, in the dtype it computes in.

    A dense weight is returned as a view, not as a copy.
    """
    return weight_of(linear).dense()


def dense_linear(like: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A frozen dense linear of `weight` [out, in] and a copy of `bias` [out].

    It is a Conv1D if `like` is a Conv1D or was packed from one, else an nn.Linear.
    """
    if is_conv1d(like) or (isinstance(like, NF4Linear) and like.conv1d):
        from transformers.pytorch_utils import Conv1D  # this import takes seconds, and only GPT-2 needs it

        with torch.device("meta"):
            linear = Conv1D(*weight.shape)
        weight = weight.t()
    else:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


class NF4Linear(nn.Module):
    """A frozen linear whose weight [out, in] is packed in NF4, or in another of `kernels.codebook.quant_types()`.

    Args:
        packed, quant_state: uint8 codes and their state, as `kernels.quantize_4bit` returns them.
        bias: [out] or None. It is not packed.
        conv1d: the weight comes from a Conv1D. `dequantize` then returns a Conv1D.

    Raises:
        ValueError: codes and a quant_state that do not belong together.
    """

    def __init__(self, packed: Tensor, quant_state: QuantState, bias: Tensor | None = None, conv1d: bool = False):
        super().__init__()
        check_packed(packed, quant_state)
        self.shape = quant_state.shape
        self.out_features, self.in_features = quant_state.shape[-2:]
        self.dtype, self.blocksize = quant_state.dtype, quant_state.blocksize
        self.quant_type, self.conv1d = quant_state.quant_type, conv1d
        self.register_buffer("weight", packed)
        self.register_buffer("absmax", quant_state.absmax)
        self.register_buffer("nested_absmax", quant_state.nested_absmax)
        self.register_buffer("nested_offset", quant_state.nested_offset)
        bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, blocksize: int | None = None, double_quant: bool = True, quant_type: str = "nf4"
    ) -> "NF4Linear":
        """Pack nn.Linear or Conv1D."""
        packed, quant_state = kernels.quantize_4bit(dense_weight(linear), blocksize, double_quant, quant_type)
        return cls(packed, quant_state, linear.bias, is_conv1d(linear))

    @property
    def quant_state(self) -> QuantState:
        nested = self.nested_absmax, self.nested_offset
        return QuantState(self.absmax, self.shape, self.dtype, self.blocksize, *nested, quant_type=self.quant_type)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.nf4_linear(*operands(x, self), bias=self.bias)

    def dequantize(self) -> nn.Module:
        """A frozen dense nn.Linear or Conv1D that computes the same."""
        return dense_linear(self, dense_weight(self), self.bias)

    def hold_codes_as_parameters(self) -> None:
        """Turn the buffers of codes and constants into frozen parameters, because FSDP shards parameters only.

        Names, dtypes and bits stay the same. nested_offset, a single number, stays a buffer.
        """
        for name in ("weight", "absmax", "nested_absmax"):
            if self._buffers.get(name) is not None:
                self.register_parameter(name, nn.Parameter(self._buffers.pop(name), requires_grad=False))

    def _apply(self, fn, recurse=True):
        # .to(dtype) changes the dtype to compute in. The constants stay fp32, so that the weights stay the same.
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
            f"{self.in_features}, {self.out_features}, {self.quant_type}, blocksize={self.blocksize}{double}, "
            f"bias={self.bias is not None}"
        )


class LoRALinear(nn.Module):
    """y = xWᵀ + s·(drop(x)Aᵀ)Bᵀ + bias over a frozen base. LoRA, Hu et al. 2021.

    Args:
        base: nn.Linear, Conv1D or NF4Linear. It is frozen.
        rank: 1 or more.
        lora_alpha: s = lora_alpha / rank, or lora_alpha / √rank with `rslora` (Kalajdzievski 2023).
        dropout: probability of dropping an element of the adapter's input, in training mode only.

    A starts Kaiming-uniform(√5) and B at zero. Both are fp32, whatever dtype the base computes in. The other
    initialisations are in `modules/adapters/init.py`. PiSSA and OLoRA start at a part B₀A₀ of the weight itself. They
    do not change W. The layer keeps A₀ and B₀ and computes with BA − B₀A₀ in place of BA, a LoRA of twice the rank.

    Raises:
        ValueError: the rank is below 1, or another library packed the base.
    """

    def __init__(self, base: nn.Module, rank: int, lora_alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank} is out of range: choose 1 or more")
        if not isinstance(base, NF4Linear) and not base.weight.is_floating_point():
            raise ValueError(
                f"the base is a {type(base).__name__} of {base.weight.dtype}: only NF4Linear may be packed"
            )
        self.base = base.requires_grad_(False)
        self.rank, self.lora_alpha, self.dropout, self.rslora = rank, lora_alpha, dropout, rslora
        self.scaling = lora_alpha / (math.sqrt(rank) if rslora else rank)
        *experts, out_features, in_features = weight_shape(base)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(*experts, rank, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A.view(-1, in_features), a=math.sqrt(5))
        self.register_buffer("init_A", None)
        self.register_buffer("init_B", None)
        self.register_parameter("bias", None)
        self.group = None  # modules.fuse gives linears that read one input their modules.fused.joined.Group

    @property
    def output_bias(self) -> Tensor | None:
        """The layer's own bias [out] if it trains one, else the base's; None if there is no bias."""
        return self.base.bias if self.bias is None else self.bias

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the update s·BA. r = rank, or 2 · rank if the layer keeps A₀ and B₀."""
        if self.init_A is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.init_A], dim=-2), torch.cat([self.lora_B, -self.init_B], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        joined = None if self.group is None else self.group.result(self, x)
        return self._alone(x) if joined is None else joined

    def _alone(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x, weight = operands(x, self.base)
        seed = seeds.draw(x.device) if dropout else None
        return kernels.lora_linear(
            x, weight, *self.factors(), self.scaling, self.output_bias, dropout=dropout, seed=seed
        )

    @torch.no_grad()
    def start_at(self, lora_A: Tensor, lora_B: Tensor, part_of_weight: bool = False) -> None:
        """Set A [rank, in] and B [out, rank].

        Args:
            part_of_weight: keep copies A₀ and B₀ of these values; the update is then s·(BA − B₀A₀), zero at first.
        """
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        if part_of_weight:
            self.init_A, self.init_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def train_bias(self) -> None:
        """Copy the base's bias, if it has one, to an fp32 bias of the layer that trains in its place."""
        if self.base.bias is not None:
            self.bias = nn.Parameter(self.base.bias.detach().to(torch.float32, copy=True))

    def set_base(self, base: nn.Module) -> None:
        """Put another base of the same shape under the adapter."""
        self.base = base.requires_grad_(False)

    def merged_weight(self) -> Tensor:
        """W + s·BA [out, in], computed in fp32 and rounded once to the base's dtype."""
        w = dense_weight(self.base)
        lora_A, lora_B = self.factors()
        return (w.float() + self.scaling * lora_B @ lora_A).to(w.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A frozen dense linear that computes the same as this layer in evaluation mode: Conv1D over a Conv1D."""
        weight = self.merged_weight()
        bias = self.output_bias
        return dense_linear(self.base, weight, None if bias is None else bias.to(weight.dtype))

    def extra_repr(self) -> str:
        rslora = ", rslora" if self.rslora else ""
        return f"rank={self.rank}, lora_alpha={self.lora_alpha}, dropout={self.dropout}{rslora}"


class DoRALinear(LoRALinear):
    """y = m/‖W + sBA‖ ⊙ (xWᵀ + s·(xAᵀ)Bᵀ) + bias, the norm taken per row. DoRA, Liu et al. 2024.

    The magnitude m starts as ‖W‖, so the layer starts as its base. The arguments are LoRALinear's.

    In evaluation mode the norm is computed once for each version of A and B. In training mode every forward computes
    it, because an optimizer that writes through `.data`, or FSDP's gathering, changes A but not its version. Whoever
    knows that nothing changes for a while says so with `modules.norms.Norms`.
    """

    def __init__(self, base: nn.Module, rank: int, lora_alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base, rank, lora_alpha, dropout, rslora)
        norm_sq = self.weight_norm_sq()
        self.register_buffer("norm_sq", norm_sq, persistent=False)
        self.magnitude = nn.Parameter(norm_sq.sqrt())
        self._cached_norm: tuple[tuple, Tensor] | None = None  # versions of its inputs, and the norm
        self.kept_norms: dict[DoRALinear, Tensor] | None = None  # of a Norms in use: training computes a norm once
        self.copies_result = False  # the model changes the result in place, and the op keeps it for backward

    def train(self, mode: bool = True) -> "DoRALinear":
        self._cached_norm = None
        return super().train(mode)

    def set_base(self, base: nn.Module) -> None:
        super().set_base(base)
        self.norm_sq = self.weight_norm_sq()

    def weight_norm_sq(self) -> Tensor:
        """‖W‖² of each row, fp32 [out]."""
        return kernels.weight_norm_sq(weight_of(self.base))

    def whole_magnitude(self) -> Tensor:
        """The magnitude of every row."""
        return self.magnitude

    def norm(self, weight: Weight) -> Tensor:
        """‖W + sBA‖ of each row of the base's `weight`, fp32 [out]."""
        return kernels.dora_norm(weight, self.norm_sq, *self.factors(), self.scaling)

    def known_norm(self, weight: Weight) -> Tensor | None:
        """‖W + sBA‖ of each row, fp32 [out]; None if the forward must compute it."""
        if torch.compiler.is_compiling():
            return None
        if self.training:
            return self._kept_norm(weight)
        inputs = (self.base.weight, self.norm_sq, self.lora_A, self.lora_B)
        key = (self.scaling, *((tensor.data_ptr(), tensor._version) for tensor in inputs))
        if self._cached_norm is None or self._cached_norm[0] != key:
            self._cached_norm = key, self.norm(weight)
        return self._cached_norm[1]

    def _kept_norm(self, weight: Weight) -> Tensor | None:
        """The norm of the Norms in use; None without one."""
        if self.kept_norms is None:
            return None
        if self in self.kept_norms:
            return self.kept_norms[self]
        norm = self.norm(weight)
        # Memory of a CUDA graph is the graph's own: a norm that is computed inside does not outlive it.
        if not (norm.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.kept_norms[self] = norm
        return norm

    def _alone(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x, weight = operands(x, self.base)
        y = kernels.dora_linear(
            x,
            weight,
            self.norm_sq,
            *self.factors(),
            self.magnitude,
            self.scaling,
            self.output_bias,
            dropout=dropout,
            seed=seeds.draw(x.device) if dropout else None,
            norm=self.known_norm(weight),
        )
        return y.clone() if self.copies_result and y.requires_grad else y

    def merged_weight(self) -> Tensor:
        """m/‖W + sBA‖ ⊙ (W + sBA) [out, in], computed in fp32 and rounded once to the base's dtype."""
        w = dense_weight(self.base)
        lora_A, lora_B = self.factors()
        v = w.float() + self.scaling * lora_B @ lora_A
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (self.whole_magnitude().unsqueeze(-1) / norm * v).to(w.dtype)
