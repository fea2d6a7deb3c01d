"""The gated MLP's product in Triton: see kernels/swiglu.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.op import supports_if
from kernels.triton.case import Case, meta
from kernels.triton.launch import cdiv, launch

BLOCK = 1024  # values a program: 8 of each operand a thread, a 128-bit load of bf16


@triton.jit
def _swiglu_kernel(
    gate_ptr,  # [n]
    up_ptr,  # [n]
    y_ptr,  # [n]
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < n, other=0.0)
    up = tl.load(up_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(gate.dtype).to(tl.float32)  # rounded where PyTorch rounds
    tl.store(y_ptr + i, (silu * up).to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr,  # [n]
    gate_ptr,  # [n]
    up_ptr,  # [n]
    dgate_ptr,  # [n]
    dup_ptr,  # [n]
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    x = tl.load(gate_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    dgate = dy * up * sigmoid * (1.0 + x * (1.0 - sigmoid))
    tl.store(dgate_ptr + i, dgate.to(dgate_ptr.dtype.element_ty), mask=i < n)
    tl.store(dup_ptr + i, (dy * x * sigmoid).to(dup_ptr.dtype.element_ty), mask=i < n)


@supports_if(lambda gate, *_: gate.dtype != torch.float64)  # the kernel computes in fp32
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    n = y.numel()
    launch(_swiglu_kernel, (cdiv(n, BLOCK),), gate, up, y, n, BLOCK=BLOCK, fp_fusion=True)
    return y


@supports_if(lambda dy, *_: dy.dtype != torch.float64)  # the kernel computes in fp32
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    n = dy.numel()
    launch(_swiglu_backward_kernel, (cdiv(n, BLOCK),), dy, gate, up, dgate, dup, n, BLOCK=BLOCK, fp_fusion=True)
    return dgate, dup


def _case(dtype: str, backward: bool) -> Case:
    x = meta(4096, 14336, dtype=dtype)
    return Case(
        kernel="swiglu_backward" if backward else "swiglu",
        config=dtype,
        call=lambda: swiglu_backward(x, x, x) if backward else swiglu(x, x),
        fn=_swiglu_backward_kernel if backward else _swiglu_kernel,
        values=BLOCK,
        bytes_per_value=(5 if backward else 3) * x.element_size(),
        max_instr=31.0 if backward else 19.5,
        max_registers=64,
        min_load_bits=128,
        min_store_bits=128,
    )


CASES = [_case(dtype, backward) for dtype in ("bf16", "fp32") for backward in (False, True)]
