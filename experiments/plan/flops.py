"""FLOPs that torch.utils.flop_counter has no formula for: of our linears and of fused attention on a CPU.

A product of [m, k] with [k, n] has 2mkn. Dequantization and element-wise work are not counted, as in torch's own
formulas.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

qdora, aten = torch.ops.qdora, torch.ops.aten
LINEARS = (
    *(qdora.nf4_linear, qdora.nf4_linear_backward, qdora.lora_linear, qdora.lora_linear_backward),
    *(qdora.dora_linear, qdora.dora_linear_backward),
)


def _adapter(tokens: int, lora_A: tuple, lora_B: tuple) -> int:
    """One product with A and one with B."""
    return 2 * tokens * (lora_A[0] * lora_A[1] + lora_B[0] * lora_B[1])


def _base(tokens: int, lora_A: tuple, lora_B: tuple) -> int:
    return 2 * tokens * lora_A[1] * lora_B[0]


@register_flop_formula(qdora.nf4_linear)
def _(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias, **_):
    return 2 * x[0] * x[1] * out_features


@register_flop_formula(qdora.nf4_linear_backward)
def _(dy, packed, absmax, nested_absmax, nested_offset, blocksize, in_features, **_):
    return 2 * dy[0] * dy[1] * in_features


@register_flop_formula(qdora.lora_linear)
def _(x, weight, absmax, nested_absmax, nested_offset, blocksize, lora_A, lora_B, *rest, **_):
    return _base(x[0], lora_A, lora_B) + _adapter(x[0], lora_A, lora_B)


@register_flop_formula(qdora.lora_linear_backward)
def _(dy, x, xa, weight, absmax, nested_absmax, nested_offset, blocksize, lora_A, lora_B, *rest, **_):
    # dxa and dB, dA; dX where it is needed
    through = _base(x[0], lora_A, lora_B) + 2 * x[0] * lora_A[0] * lora_A[1] if rest[-1] else 0
    return _adapter(x[0], lora_A, lora_B) + 2 * x[0] * lora_B[0] * lora_B[1] + through


@register_flop_formula(qdora.dora_linear)
def _(x, weight, absmax, nested_absmax, nested_offset, blocksize, norm_sq, norm, lora_A, lora_B, *rest, **_):
    rank, (_, _, _, dropout, _) = lora_A[0], rest
    of_norm = 2 * rank * (lora_A[1] * lora_B[0] + rank * (lora_A[1] + lora_B[0])) if norm is None else 0
    products = 2 if dropout else 1
    return products * _base(x[0], lora_A, lora_B) + _adapter(x[0], lora_A, lora_B) + of_norm


@register_flop_formula(qdora.dora_linear_backward)
def _(dy, x, *args, **_):
    lora_A, lora_B, _, _, dropout, _, needs_dx = args[-7:]
    products = 2 if dropout else 1
    through = products * _base(x[0], lora_A, lora_B) + 2 * x[0] * lora_A[0] * lora_A[1] if needs_dx else 0
    return _adapter(x[0], lora_A, lora_B) + 2 * x[0] * lora_B[0] * lora_B[1] + through


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
