"""Cross-entropy of the logits of a linear in Triton: see kernels/cross_entropy.py.

The products are the library's. One launch a chunk reads the logits of each row twice and writes their gradient in their
place; no logits in fp32 are in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy import IGNORED, by_chunks
from kernels.op import supports_if
from kernels.triton.case import Case, meta
from kernels.triton.launch import launch

BLOCK = 4096  # columns at once
NUM_WARPS = 8


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # [rows, V], which become softmax − [v = target]
    targets_ptr,  # i64 [rows]
    loss_ptr,  # fp32 [rows]
    V,
    IGNORED: tl.constexpr,  # the target of a row without loss and gradient
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    known = target != IGNORED
    end = tl.where(known, V, 0)  # nothing is read of a row that is ignored
    at_target = tl.load(logits_ptr + target, mask=known, other=0.0).to(tl.float32)  # before it is overwritten
    highest, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, end, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x, propagate_nan=tl.PropagateNan.ALL)
        # a column that has seen -inf alone has no highest to subtract
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.exp(x - shift)
        highest = higher
    top = tl.where(known, tl.max(highest, 0), 0.0)  # where nothing was read, loss and gradient become 0
    total = tl.where(known, tl.sum(total * tl.exp(highest - top), 0), 1.0)
    tl.store(loss_ptr + row, tl.log(total) + top - at_target)
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + v, mask=v < end, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - top) / total - (v == target).to(tl.float32)
        tl.store(logits_ptr + v, gradient.to(logits_ptr.dtype.element_ty), mask=v < V)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ cross-entropy of logits [rows, vocabulary], fp32; they become their gradient."""
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    args = (logits, targets, loss, logits.shape[1], IGNORED)
    launch(_cross_entropy_kernel, (len(logits),), *args, BLOCK=BLOCK, num_warps=NUM_WARPS, fp_fusion=True)
    return loss.sum()


@supports_if(lambda hidden, *_: hidden.dtype != torch.float64)  # the sums here are fp32
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return by_chunks(_loss, hidden, weight, bias, targets, needs_dhidden, needs_dweight, needs_dbias)


def _case(dtype: str) -> Case:
    logits, targets = meta(512, 128256, dtype=dtype), meta(512, dtype=torch.int64)
    return Case(
        kernel="cross_entropy",
        config=dtype,
        call=lambda: _loss(logits, targets),
        fn=_cross_entropy_kernel,
        values=BLOCK,
        bytes_per_value=3 * logits.element_size(),
        loop=True,
        max_instr=21.5,
        max_registers=80,
        min_load_bits=128,
        min_store_bits=128,
    )


CASES = [_case("bf16"), _case("fp32")]
