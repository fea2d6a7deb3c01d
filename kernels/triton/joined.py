"""Adapted linears of one input in Triton: see kernels/joined.py.

Launches, where a sum is not split (low_rank.py): forward 3 for all linears (two make the factors in x's dtype, one
[xa₁ … xaₙ]); for each dequantize, the product with everything else in its epilogue, and with DoRA the norm (dora.py).
Backward makes dzᵢ and dxaᵢ of each; all dA and dB in one launch, dA scaled in another; dx begins as [dxa₁ … dxaₙ] Ā, to
which each product dzᵢ Wᵢ adds itself (gemm.py). So x is read once for all A, once for all dA, and no two gradients of x
are ever in memory.
"""

import torch
from torch import Tensor

from kernels.triton.dora import magnitude_gradient, scale
from kernels.triton.dora_norm import norm_and_gain
from kernels.triton.gemm import add_product, gemm
from kernels.triton.low_rank import project
from kernels.triton.nf4 import dense
from kernels.triton.nf4_linear import product
from kernels.triton.outer import MOST_LINEARS, outers
from kernels.weight import Weight


def joined_linears(
    x: Tensor,
    weights: list[Weight],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    magnitude: list[Tensor | None],
    norm_sq: list[Tensor | None],
    scaling: list[float],
) -> tuple[list[Tensor], list[Tensor]]:
    x, ranks = x.contiguous(), [len(A) for A in lora_A]
    a_all = torch.empty(sum(ranks), x.shape[1], dtype=x.dtype, device=x.device)
    bs = [torch.empty(B.shape, dtype=x.dtype, device=x.device) for B in lora_B]
    torch._foreach_copy_([*a_all.split(ranks), *bs], [*torch._foreach_mul(lora_A, scaling), *lora_B])
    xa_all = project(x, a_all.t(), 1.0)
    ys, norms, gains = [], [], []
    for i, (weight, xa, b, m) in enumerate(zip(weights, xa_all.split(ranks, 1), bs, magnitude)):
        if m is None:
            norm = gain = None
        else:
            norm, gain = norm_and_gain(weight, x.dtype, lora_A[i], lora_B[i], scaling[i], m)
        ys.append(product(x, weight, xa, b.t(), gain=gain)[0])
        norms.append(x.new_empty(0, dtype=torch.float32) if norm is None else norm)
        gains.append(x.new_empty(0, dtype=torch.float32) if gain is None else gain)
    return ys, [a_all, xa_all, *bs, *norms, *gains]


def joined_linears_backward(
    dys: list[Tensor],
    x: Tensor,
    ys: list[Tensor | None],
    kept: list[Tensor],
    weights: list[Weight],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    magnitude: list[Tensor | None],
    scaling: list[float],
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    x, n, ranks = x.contiguous(), len(weights), [len(A) for A in lora_A]
    a_all, xa_all, bs = kept[0], kept[1], kept[2 : 2 + n]
    norms, gains = kept[2 + n : 2 + 2 * n], kept[2 + 2 * n :]
    scaled = [(dy, None) if m is None else scale(dy, y, gain) for dy, y, m, gain in zip(dys, ys, magnitude, gains)]
    dzs, xas = [dz for dz, _ in scaled], xa_all.split(ranks, 1)
    dxa_all = torch.empty(xa_all.shape, dtype=x.dtype, device=x.device)
    for dz, b, dxa in zip(dzs, bs, dxa_all.split(ranks, 1)):
        project(dz, b, 1.0, out=dxa)
    dA_parts, dB = [], []
    for i in range(0, n, MOST_LINEARS):
        part = slice(i, i + MOST_LINEARS)
        dxa = dxa_all[:, sum(ranks[:i]) : sum(ranks[: part.stop])]
        dtypes = torch.float32, [B.dtype for B in lora_B[part]]
        dA_all, dBs = outers(x, dxa, dzs[part], xas[part], dtypes)
        dA_parts += dA_all.split(ranks[part])
        dB += dBs
    dA = [dA.to(A.dtype) for dA, A in zip(torch._foreach_mul(dA_parts, scaling), lora_A)]
    dx = gemm(dxa_all, a_all)[0] if needs_dx else x.new_empty(0)
    dm = []
    for i, (weight, dz, (_, partial), m) in enumerate(zip(weights, dzs, scaled, magnitude)):
        w = dense(weight, x.dtype) if needs_dx or m is not None else None
        if needs_dx:
            add_product(dx, dz, w)
        if m is None:
            dm.append(x.new_empty(0))
        else:
            rest = (lora_B[i], m, norms[i], gains[i])
            dm.append(magnitude_gradient(partial, dys[i], x, w, xas[i], *rest, kept_y=True))
    return dx, dA, dB, dm
