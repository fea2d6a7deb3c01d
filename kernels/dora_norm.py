"""The DoRA norm ‖W + sBA‖ of each row, over a dense or NF4 base weight.

    ‖W + sBA‖² = ‖W‖² + 2s·Σ_j B_ij (WAᵀ)_ij + s²·(B(AAᵀ)Bᵀ)_ii             the torch twin, row i
    ‖W + sBA‖² = Σ_k (W_ik + s·(BA)_ik)²                                     the kernel, see row_norm.py

The twin's factored form needs only matrix products with the rank for one side, and ‖W‖², which is computed once. The
kernel has W and sBA side by side in registers and needs neither. DoRA, Liu et al. 2024, §4.3.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.base_weight import base_args, check_adapter, dense_weight
from kernels.dispatch import use_triton
from kernels.library import define_op, register_fake
from kernels.quant_state import QuantState
from kernels.row_norm import launch_norm, sums_of_squares


@define_op("weight_norm_sq")
def _weight_norm_sq(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: list[int],
) -> Tensor:
    base = (weight, absmax, nested_absmax, nested_offset, blocksize, quant_type)
    if use_triton(weight):
        return sums_of_squares(base, (shape[0], shape[1]), torch.float32 if blocksize else weight.dtype).sum(dim=0)
    return reference.weight_norm_sq(dense_weight(base, (shape[0], shape[1]), torch.float32))


@register_fake("weight_norm_sq")
def _(weight, absmax, nested_absmax, nested_offset, blocksize, quant_type, shape):
    return weight.new_empty(shape[0], dtype=torch.float32)


@define_op("dora_norm")
def _dora_norm(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    norm_sq: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    base = (weight, absmax, nested_absmax, nested_offset, blocksize, quant_type)
    shape = (lora_B.shape[0], lora_A.shape[1])
    if use_triton(weight, products=True):
        return launch_norm(base, shape, dtype, lora_A, lora_B, scaling)[0]
    return reference.dora_norm(dense_weight(base, shape, dtype), norm_sq, lora_A, lora_B, scaling)


@register_fake("dora_norm")
def _(weight, absmax, nested_absmax, nested_offset, blocksize, quant_type, norm_sq, lora_A, lora_B, scaling, dtype):
    return torch.empty_like(norm_sq)


def weight_norm_sq(weight: Tensor, quant_state: QuantState | None = None) -> Tensor:
    """‖W‖² of each row, fp32 [out], of a dense weight [out, in] or of packed codes with their quant_state."""
    shape = weight.shape if quant_state is None else quant_state.shape
    dtype = weight.dtype if quant_state is None else quant_state.dtype
    base = base_args(weight, quant_state, weight.new_empty(0, shape[-1], dtype=dtype))
    return _weight_norm_sq(*base, shape)


def dora_norm(
    weight: Tensor,
    norm_sq: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    quant_state: QuantState | None = None,
) -> Tensor:
    """‖W + scaling·BA‖ of each row, fp32 [out]. Not differentiable.

    Args:
        weight: [out, in], or packed codes with their `quant_state`.
        norm_sq: fp32 [out], what `weight_norm_sq` returns for this weight.
        lora_A: [rank, in], lora_B: [out, rank].
        scaling: α / rank, or α / √rank.

    Raises:
        ValueError: shapes that do not fit.
    """
    dtype = weight.dtype if quant_state is None else quant_state.dtype
    x = lora_A.new_empty(0, lora_A.shape[-1], dtype=dtype)
    base = base_args(weight, quant_state, x)
    out_features = weight.shape[0] if quant_state is None else quant_state.shape[0]
    check_adapter(x, lora_A, lora_B, out_features)
    if norm_sq.shape != (out_features,):
        raise ValueError(f"norm_sq {tuple(norm_sq.shape)} must be [{out_features}]")
    return _dora_norm(*base, norm_sq, lora_A.detach(), lora_B.detach(), scaling, dtype)
