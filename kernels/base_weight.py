"""The frozen base weight of an adapted linear, dense or packed in four bits, as ops take it.

A `torch.library` op takes tensors and numbers, so a weight travels as six arguments: the dense weight [out, in] or
the packed codes, the tensors of its QuantState, its blocksize and its data type (None, 0 and "" for a dense one).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebook import NESTED_BLOCKSIZE
from kernels.nf4 import dequantize_impl
from kernels.quant_state import FLOATS, QuantState, check_packed

BaseArgs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, str]

_NESTED = tl.constexpr(NESTED_BLOCKSIZE)


def base_args(weight: Tensor, quant_state: QuantState | None, x: Tensor) -> BaseArgs:
    """Check a base weight against the input it will meet and flatten it for an op.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    shape = weight.shape if quant_state is None else quant_state.shape
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; it must be float32, float16 or bfloat16")
    if len(shape) != 2 or x.dim() == 0 or shape[1] != x.shape[-1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight of shape {tuple(shape)}")
    if quant_state is None:
        if weight.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype} but the weight is {weight.dtype}")
        return weight, None, None, None, 0, ""
    check_packed(weight, quant_state)
    return weight, *quant_state.tensors(), quant_state.blocksize, quant_state.quant_type


def dense_weight(base: BaseArgs, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`: itself if dense, dequantized if packed, and then valid until the next call."""
    weight, *state, blocksize, quant_type = base
    if state[0] is None:
        return weight
    return dequantize_impl(weight, *state, blocksize, quant_type, list(shape), dtype, reuse=True)


def check_adapter(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, out_features: int, bias: Tensor | None = None, dropout: float = 0.0
) -> None:
    """Check an adapter against x [..., in] and the base weight [out, in].

    Raises:
        ValueError: shapes that do not fit, a rank of 0 or a dropout outside [0, 1).
    """
    rank = lora_A.shape[0]
    if rank == 0 or lora_A.shape != (rank, x.shape[-1]) or lora_B.shape != (out_features, rank):
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a weight "
            f"of shape {(out_features, x.shape[-1])}: they must be [rank, in] and [out, rank] with rank ≥ 1"
        )
    check_bias(bias, out_features)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")


def check_bias(bias: Tensor | None, out_features: int) -> None:
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias {tuple(bias.shape)} must be [{out_features}]")


@triton.jit
def load_row_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, block, mask):  # fp32, block's shape
    """absmax of any blocks (int64), dequantized if nested_absmax_ptr is not None; 0 or the offset where masked."""
    if nested_absmax_ptr is None:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested_absmax = tl.load(nested_absmax_ptr + block // _NESTED, mask=mask, other=0.0)
        return tl.load(map_ptr + code) * nested_absmax + tl.load(nested_offset_ptr)
