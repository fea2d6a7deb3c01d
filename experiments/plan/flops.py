"""FLOPs that torch.utils.flop_counter has no formula for: of our linears and of fused attention on a CPU.

A product of [m, k] with [k, n] has 2mkn. Dequantization and element-wise work are not counted, as in torch's own
formulas.
"""

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.weight import packed_shape

qdora, aten = torch.ops.qdora, torch.ops.aten
LINEARS = (
    *(qdora.nf4_linear, qdora.nf4_linear_backward, qdora.lora_linear, qdora.lora_linear_backward),
    *(qdora.dora_linear, qdora.dora_linear_backward),
)
EXPERTS = (
    *(qdora.experts_linear, qdora.experts_linear_backward, qdora.experts_lora, qdora.experts_lora_backward),
    *(qdora.experts_dora, qdora.experts_dora_backward),
)


def _formula(op: torch._ops.OpOverloadPacket) -> Callable[[Callable[..., int]], None]:
    """Decorator: the function is an op's formula. It gets the op's arguments by name, shapes in place of tensors."""
    names = [argument.name for argument in op.default._schema.arguments]
    return lambda formula: register_flop_formula(op)(lambda *args, **_: formula(**dict(zip(names, args))))


def _adapter(tokens: int, lora_A: tuple, lora_B: tuple) -> int:
    """One product with A and one with B."""
    return 2 * tokens * (lora_A[0] * lora_A[1] + lora_B[0] * lora_B[1])


def _base(tokens: int, lora_A: tuple, lora_B: tuple) -> int:
    return 2 * tokens * lora_A[1] * lora_B[0]


@_formula(qdora.nf4_linear)
def _(x, weight_format, **_):
    return 2 * x[0] * packed_shape(weight_format).numel()


@_formula(qdora.nf4_linear_backward)
def _(dy, weight_format, **_):
    return 2 * dy[0] * packed_shape(weight_format).numel()


@_formula(qdora.lora_linear)
def _(x, lora_A, lora_B, **_):
    return _forward(x, lora_A, lora_B, 1)


@_formula(qdora.dora_linear)
def _(x, norm, lora_A, lora_B, dropout, **_):
    of_norm = _norm(lora_A, lora_B) if norm is None else 0
    return _forward(x, lora_A, lora_B, 2 if dropout else 1) + of_norm


def _forward(x: tuple, lora_A: tuple, lora_B: tuple, products: int) -> int:
    """So many products with the base, and the adapter's."""
    return products * _base(x[0], lora_A, lora_B) + _adapter(x[0], lora_A, lora_B)


def _norm(lora_A: tuple, lora_B: tuple) -> int:
    """The products in ‖W + sBA‖: WAᵀ, AAᵀ and B(AAᵀ)."""
    rank = lora_A[0]
    return 2 * rank * (lora_A[1] * lora_B[0] + rank * (lora_A[1] + lora_B[0]))


def _backward(x: tuple, lora_A: tuple, lora_B: tuple, products: int, needs_dx: bool) -> int:
    """dxa, dA and dB, and dX where it is needed, which takes so many products with the base."""
    dx = products * _base(x[0], lora_A, lora_B) + 2 * x[0] * lora_A[0] * lora_A[1] if needs_dx else 0
    return _adapter(x[0], lora_A, lora_B) + 2 * x[0] * lora_B[0] * lora_B[1] + dx


@_formula(qdora.lora_linear_backward)
def _(x, lora_A, lora_B, needs_dx, **_):
    return _backward(x, lora_A, lora_B, 1, needs_dx)


@_formula(qdora.dora_linear_backward)
def _(x, lora_A, lora_B, dropout, needs_dx, **_):
    return _backward(x, lora_A, lora_B, 2 if dropout else 1, needs_dx)


# Of experts each row of x is a token of one of them, so the FLOPs are those of a linear of as many rows.


def _expert_shape(weight: list[tuple], weight_format: str) -> torch.Size:
    """[experts, out, in]"""
    return weight[0] if len(weight) == 1 else packed_shape(weight_format)


@_formula(qdora.experts_linear)
def _(x, weight, weight_format, **_):
    return 2 * x[0] * math.prod(_expert_shape(weight, weight_format)[1:])


@_formula(qdora.experts_linear_backward)
def _(dy, weight, weight_format, **_):
    return 2 * dy[0] * math.prod(_expert_shape(weight, weight_format)[1:])


@_formula(qdora.experts_lora)
def _(x, lora_A, lora_B, **_):
    return _forward(x, lora_A[1:], lora_B[1:], 1)


@_formula(qdora.experts_dora)
def _(x, norm, lora_A, lora_B, dropout, **_):
    with_rows = min(x[0], lora_A[0])  # experts, if the rows are spread evenly
    of_norms = with_rows * _norm(lora_A[1:], lora_B[1:]) if norm is None else 0
    return _forward(x, lora_A[1:], lora_B[1:], 2 if dropout else 1) + of_norms


@_formula(qdora.experts_lora_backward)
def _(x, lora_A, lora_B, needs_dx, **_):
    return _backward(x, lora_A[1:], lora_B[1:], 1, needs_dx)


@_formula(qdora.experts_dora_backward)
def _(x, lora_A, lora_B, dropout, needs_dx, **_):
    return _backward(x, lora_A[1:], lora_B[1:], 2 if dropout else 1, needs_dx)


@register_flop_formula(aten._grouped_mm)
def _(a, b, *_, **__):
    """Of transformers' own experts. Each row of `a` meets one group of `b`, or each column in the gradient of `b`."""
    return 2 * a[0] * a[1] * b[-1]


@register_flop_formula(aten.addmm_)
def _(added, a, b, **_):
    return 2 * a[0] * a[1] * b[1]


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _(query, key, value, *args, **_):
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])  # the whole square, as torch counts causal ones


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _(grad_out, query, key, value, *args, **_):
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (3 * width + 2 * value[3])
