"""The linears of all experts of a layer as one module, dense or packed, with or without adapters.

They take rows that are sorted by expert, as kernels/experts.py does. modules/mixtures.py puts them into a model.

state_dict keys
    ExpertsLinear              those of transformers' parameters, in their layout: <path>, <path>_bias
    NF4Experts                 as NF4Linear, of a weight [experts, out, in]; but <path>_bias
    LoRAExperts, DoRAExperts   base.*, lora_A [experts, rank, in], lora_B [experts, out, rank],
                               magnitude [experts, out]; of the chosen experts alone, [1, …] where all share a factor
"""

import torch
from torch import Tensor, nn

import kernels
from kernels import QuantState, Weight
from modules import seeds
from modules.linear import DoRALinear, LoRALinear, NF4Linear, dense_weight, operands, weight_of


class ExpertsLinear(nn.Module):
    """Frozen linears of one shape, one for each expert.

    Args:
        weight: [experts, out, in].
        bias: [experts, out] or None.
        in_out: the model keeps the weight as [experts, in, out].
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, in_out: bool = False):
        super().__init__()
        self.num_experts, self.out_features, self.in_features = weight.shape
        self.in_out = in_out
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows [S, in] sorted by expert to rows [S, out]. `ends` is as in kernels/experts.py."""
        if self.weight.requires_grad:  # the op is for frozen weights
            return self._by_torch(x, ends)
        x, weight = operands(x, self)
        return kernels.experts_linear(x, ends, weight, self.bias)

    def _by_torch(self, x: Tensor, ends: Tensor) -> Tensor:
        ends = ends.tolist()
        *parts, others = x.tensor_split(ends)
        biases = [None] * len(parts) if self.bias is None else self.bias
        results = [nn.functional.linear(part, *of) for part, *of in zip(parts, self.weight, biases)]
        return torch.cat([*results, others.new_zeros(len(others), self.out_features)])

    def own_weight(self) -> Tensor:
        """The weight in the layout that the model keeps it in."""
        return self.weight.transpose(1, 2).contiguous() if self.in_out else self.weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        key, weight = prefix.removesuffix("."), self.own_weight()
        destination[key] = weight if keep_vars else weight.detach()
        if self.bias is not None:
            destination[f"{key}_bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = f"{prefix}weight"
        if self.in_out and key in state_dict:
            state_dict = state_dict | {key: state_dict[key].transpose(1, 2)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shape = f"{self.num_experts} experts, {self.in_features}, {self.out_features}"
        return f"{shape}, bias={self.bias is not None}"


class NF4Experts(NF4Linear):
    """Frozen linears of one shape, one for each expert. Their weight [experts, out, in] is packed as one tensor."""

    def __init__(self, packed: Tensor, quant_state: QuantState, bias: Tensor | None = None, in_out: bool = False):
        super().__init__(packed, quant_state, bias)
        self.num_experts, self.in_out = quant_state.shape[0], in_out

    @classmethod
    def from_linear(
        cls, linear: ExpertsLinear, blocksize: int | None = None, double_quant: bool = True, quant_type: str = "nf4"
    ) -> "NF4Experts":
        packed, quant_state = kernels.quantize_4bit(linear.weight.detach(), blocksize, double_quant, quant_type)
        return cls(packed, quant_state, linear.bias, linear.in_out)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        x, weight = operands(x, self)
        return kernels.experts_linear(x, ends, weight, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None:  # under transformers' name, which a model with dense experts has too
            destination[f"{prefix.removesuffix('.')}_bias"] = destination.pop(f"{prefix}bias")

    def dequantize(self) -> ExpertsLinear:
        return dense_experts(self, dense_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {super().extra_repr()}"


def dense_experts(like: ExpertsLinear | NF4Experts, weight: Tensor, bias: Tensor | None) -> ExpertsLinear:
    """Frozen dense linears of `weight` [experts, out, in] and a copy of `bias`, for the place of `like`."""
    bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return ExpertsLinear(nn.Parameter(weight.detach().contiguous(), requires_grad=False), bias, like.in_out)


def pack_linear(linear: nn.Module, blocksize: int, double_quant: bool, quant_type: str) -> NF4Linear:
    """The packed linear of a dense one: nn.Linear, Conv1D or ExpertsLinear."""
    kind = NF4Experts if isinstance(linear, ExpertsLinear) else NF4Linear
    return kind.from_linear(linear, blocksize, double_quant, quant_type)


class LoRAExperts(LoRALinear):
    """LoRALinear of every expert: y = xWₑᵀ + s·(drop(x)Aₑᵀ)Bₑᵀ + biasₑ for the rows x of expert e.

    Biases stay frozen.
    """

    def __init__(self, base: nn.Module, rank: int, lora_alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base, rank, lora_alpha, dropout, rslora)
        self.register_buffer("chosen", None, persistent=False)

    def choose(self, numbers: list[int]) -> None:
        """Have A, B and magnitude for the experts `numbers` alone. The others compute what the base does.

        Raises:
            ValueError: a number is not that of an expert.
        """
        if wrong := [number for number in numbers if number >= self.base.num_experts]:
            raise ValueError(f"experts: {wrong[0]} is not one of the {self.base.num_experts}, 0 and up")
        self.chosen = torch.tensor(sorted(numbers), device=self.lora_A.device)
        self._take(self.chosen, "lora_A", "lora_B")

    def share(self, factor: str) -> None:
        """Have one A or one B for all experts. `factor` is "A" or "B"."""
        self._take(self.lora_A.new_zeros(1, dtype=torch.int64), f"lora_{factor}")

    @torch.no_grad()
    def _take(self, numbers: Tensor, *names: str) -> None:
        for name in names:
            setattr(self, name, nn.Parameter(getattr(self, name)[numbers]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [experts, r, in] and B [experts, out, r] of the update s·BA, with zeros for experts that have none."""
        lora_A, lora_B = super().factors()
        experts = max(len(lora_A), len(lora_B))
        lora_A, lora_B = (factor.expand(experts, *factor.shape[1:]) for factor in (lora_A, lora_B))
        return (lora_A, lora_B) if self.chosen is None else (self._among_all(lora_A), self._among_all(lora_B))

    def _among_all(self, of_chosen: Tensor) -> Tensor:
        zeros = of_chosen.new_zeros(self.base.num_experts, *of_chosen.shape[1:])
        return zeros.index_copy(0, self.chosen, of_chosen)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x, weight = operands(x, self.base)
        seed = seeds.draw(x.device) if dropout else None
        return kernels.experts_lora(
            x, ends, weight, *self.factors(), self.scaling, self.base.bias, dropout=dropout, seed=seed
        )

    @torch.no_grad()
    def merge(self) -> ExpertsLinear:
        weight = self.merged_weight()
        if self.chosen is not None:
            weight = dense_weight(self.base).index_copy(0, self.chosen, weight[self.chosen])
        return dense_experts(self.base, weight, self.base.bias)

    def train_bias(self) -> None:
        """Leave the biases of experts frozen."""


class DoRAExperts(LoRAExperts, DoRALinear):
    """DoRALinear of every expert."""

    def choose(self, numbers: list[int]) -> None:
        super().choose(numbers)
        self._take(self.chosen, "magnitude")

    def weight_norm_sq(self) -> Tensor:
        weight = weight_of(self.base)
        return kernels.weight_norm_sq(weight.rows()).view(weight.shape[:2])

    def norm(self, weight: Weight) -> Tensor:
        return kernels.experts_norm(weight, self.norm_sq, *self.factors(), self.scaling)

    def whole_magnitude(self) -> Tensor:
        return self.magnitude if self.chosen is None else self.norm_sq.sqrt().index_copy(0, self.chosen, self.magnitude)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x, weight = operands(x, self.base)
        magnitude = self.whole_magnitude()
        return kernels.experts_dora(
            *(x, ends, weight, self.norm_sq, *self.factors(), magnitude, self.scaling, self.base.bias),
            dropout=dropout,
            seed=seeds.draw(x.device) if dropout else None,
            norm=self.known_norm(weight),
        )


def is_experts(linear: nn.Module) -> bool:
    """True for the linears of experts, dense or packed."""
    return isinstance(linear, ExpertsLinear | NF4Experts)
