"""Pack a weight and find a low-rank start that compensates for the error: Q + BA ≈ W.

    loftq    BA = 0
    pissa    BA = the r principal components of W
    then, `iterations` times:  Q = quantize(W − BA),  BA = the r principal components of W − Q

LoftQ: Li et al. 2023, algorithm 1. Quantized PiSSA ("QPiSSA, T iterations"): Meng et al. 2024, §4. Both are the same
alternation with different starts. With the PiSSA start, Q holds the rest of W and the adapter trains the principal
components. With one iteration of LoftQ, Q is the plain quantized W. Both have a smaller error than quantizing alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels import QuantState
from modules.adapters.decompose import decompose

STARTS = ("loftq", "pissa")


@dataclass(frozen=True)
class QuantizedInit:
    """The result of `quantized_init`.

    Attributes:
        packed, quant_state: uint8 codes of Q and their state.
        lora_A: [rank, in] fp32.
        lora_B: [out, rank] fp32.
        errors: ‖W − Q − BA‖ / ‖W‖ after each iteration. It falls.
    """

    packed: Tensor
    quant_state: QuantState
    lora_A: Tensor
    lora_B: Tensor
    errors: list[float]


@torch.no_grad()
def quantized_init(
    w: Tensor,
    rank: int,
    start: str = "loftq",
    iterations: int = 5,
    blocksize: int | None = None,
    double_quant: bool = True,
    quant_type: str = "nf4",
    method: str = "randomized",
) -> QuantizedInit:
    """Alternate between quantizing and decomposing `w`, as long as that lowers the error.

    Args:
        w: [out, in], fp32, fp16 or bf16.
        rank: 1 … min(out, in).
        start: one of STARTS.
        iterations: at most so many, 1 or more. An iteration that does not lower the error is the last, and is undone.
        blocksize, double_quant, quant_type: see `kernels.quantize_4bit`.
        method: see `modules.adapters.decompose`. On real weights, randomized needs a third of svd's time for
            the same error.

    Raises:
        ValueError: the start is unknown, iterations is below 1, or `quantize_4bit` or `decompose` refuses its input.
    """
    if start not in STARTS:
        raise ValueError(f"start {start!r} is not one of {', '.join(STARTS)}")
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: choose 1 or more")
    dense, norm = w.float(), w.float().norm()
    product = torch.zeros_like(dense)
    if start == "pissa":
        lora_A, lora_B = decompose(dense, rank, method)
        product = lora_B @ lora_A
    best, errors = None, []
    for _ in range(iterations):
        packed, state = kernels.quantize_4bit((dense - product).to(w.dtype), blocksize, double_quant, quant_type)
        left = dense - kernels.dequantize_4bit(packed, state, torch.float32)
        lora_A, lora_B = decompose(left, rank, method)
        product = lora_B @ lora_A
        error = ((left - product).norm() / norm).item() if norm else 0.0
        if errors and error >= errors[-1]:
            break
        errors.append(error)
        best = packed, state, lora_A, lora_B
    return QuantizedInit(*best, errors)
