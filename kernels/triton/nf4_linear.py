"""The linear over a packed weight in Triton, and the choice of the way in which any frozen weight is multiplied.

    y = gain ⊙ (x Wᵀ + S V) + bias         every factor and term after x Wᵀ may be absent

Few tokens are multiplied with the codes, without a dense W: nf4_gemv.py, nf4_small_batch.py. Of more tokens each would
have to decode W again: W is dequantized once, and the product is the library's, or gemm.py's.
"""

import torch
from torch import Tensor

from kernels.triton import nf4_gemv, nf4_small_batch
from kernels.triton.gemm import gemm
from kernels.triton.nf4 import dense
from kernels.weight import Weight

# The most tokens of each way, if it supports the tensors; beyond, W is dequantized.
#
# On paper, not measured: an H100 issues 0.93 warp instructions a picosecond, so these ways need 0.17 to 0.3 ps a weight
# (`python -m kernels.aot 'nf4_gem*'`). An H200 reads the codes in 0.11 ps. Dequantizing alone was measured on an H200:
# 0.98 ps a weight. So was the dense product in bf16, in ms at 1 / 16 / 64 tokens, and bitsandbytes 0.50.2's:
#   out × in        dense                    bitsandbytes             dequantize, then dense
#   4096 × 4096     0.019 / 0.019 / 0.018    0.015 / 0.043 / 0.038    0.035
#   14336 × 4096    0.041 / 0.041 / 0.042    0.034 / 0.071 / 0.114    0.100
#   4096 × 14336    0.042 / 0.042 / 0.045    0.034 / 0.113 / 0.116    0.101
# fp32 has no matrix units, so more than a few of its tokens are the library's. Change the numbers where
# `python -m kernels.bench nf4_linear` says otherwise: its provider "torch" dequantizes and multiplies.
GEMV_TOKENS = 4
SMALL_BATCH_TOKENS = 64


def product(
    x: Tensor,
    weight: Weight,
    s: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, z or None): z = x Wᵀ + s v, y = gain ⊙ z + bias, of a dense or packed weight [N, K].

    x [M, K] is contiguous and s [M, R] in its rows; v [R, N] may have any strides. Launches over a packed weight: 1 for
    up to GEMV_TOKENS, else 2.
    """
    tokens = x.shape[0]
    if tokens <= GEMV_TOKENS and nf4_gemv.supports(x, weight):
        return nf4_gemv.gemv(x, weight, s, v, bias, gain, keep_z)
    if tokens <= SMALL_BATCH_TOKENS and nf4_small_batch.supports(x, weight):
        return gemm(x, None, s, v, bias, gain, keep_z, xw=nf4_small_batch.few_tokens(x, weight))
    w = dense(weight, x.dtype)
    if s is None and gain is None and not keep_z:
        return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype)), None
    return gemm(x, w.t(), s, v, bias, gain, keep_z)


def nf4_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return product(x.contiguous(), weight, bias=bias)[0]


def nf4_linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    return dy @ dense(weight, dy.dtype)
