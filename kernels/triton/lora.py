"""LoRA in Triton: see kernels/lora.py.

Launches over a packed weight: forward 3 (dequantize, xa, the product with everything else in its epilogue), y written
once; backward 4 (dequantize, dxa, dA with dB, dX), dX written once. Few tokens skip the dequantization: forward is
xa (few_tokens.py) and the product with everything else, one launch for up to 4 tokens, two for up to 64
(nf4_linear.py).

Backward reads dY three times, for dxa, dB and dX. One pass for the first two would keep the sums of one of them on chip
and write those of the other as fp32 partial sums, once for each tile of tokens: 8·r / BLOCK_M bytes an element of dY to
write and read, against the 2 bytes of bf16 that it saves. At 128 tokens a tile that is 4 bytes at rank 64, 1 byte at
rank 16, where at most one byte in six would be won and 4096 tokens would keep only 32 of a GPU's multiprocessors busy.
"""

from torch import Tensor

from kernels.triton import few_tokens
from kernels.triton.gemm import gemm
from kernels.triton.low_rank import project
from kernels.triton.nf4 import dense
from kernels.triton.nf4_linear import product
from kernels.triton.outer import outer
from kernels.weight import Weight


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    few = few_tokens.supports(x, dropout)
    xa = few_tokens.adapter(x, lora_A, scaling)[0] if few else project(x, lora_A.t(), scaling, dropout, seed)
    return product(x, weight, xa, lora_B.t(), bias)[0], xa


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    dxa = project(dy, lora_B, scaling)
    dA, dB = outer(x, dxa, dy, xa, (lora_A.dtype, lora_B.dtype), dropout, seed)
    dx = gemm(dy, dense(weight, x.dtype), dxa, lora_A, p=dropout, seed=seed)[0] if needs_dx else x.new_empty(0)
    return dx, dA, dB
