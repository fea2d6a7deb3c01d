"""The Triton kernels of lora_linear where its tests do not look: many tiles, memory, repeatability, launches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import Weight, use_backend
from kernels.lora import _lora_linear, _lora_linear_backward
from kernels.triton import dora, lora
from kernels.triton.case import meta, meta_packed
from kernels.triton.launch import recording
from tests.kernels.linear_cases import assert_as_accurate, plain_linear, randn, with_gradients
from tests.kernels.nf4_cases import embedded, guarded_memory, needs_triton


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize("library", [False, True], ids=["fused", "library-gemm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_kernels_over_many_tiles_write_all_of_their_outputs_and_nothing_else(dtype, library, monkeypatch):
    """Several tiles in each direction with tails, inputs between poison, outputs that held NaN before."""
    monkeypatch.setattr("kernels.triton.gemm.use_library", lambda x: library)
    # tiles are 64 × 64 × 16 in fp32 and 128 × 128 × 64 in fp16
    tokens, in_features, out_features, rank = (70, 66, 68, 18) if dtype == torch.float32 else (150, 140, 270, 130)
    p = 0.2
    seed = torch.tensor(7)
    x, dy = randn(tokens, in_features, seed=2, dtype=dtype), randn(tokens, out_features, seed=6, dtype=dtype)
    w = randn(out_features, in_features, seed=1, dtype=dtype) / in_features**0.5
    lora_A, lora_B = randn(rank, in_features, seed=3) / in_features**0.5, randn(out_features, rank, seed=4) / rank**0.5
    x, dy, w, lora_A, lora_B = (embedded(t, 64) for t in (x, dy, w, lora_A, lora_B))
    base, adapter = Weight(w), (lora_A, lora_B)

    def forward_and_backward():
        y, xa = _lora_linear(x, base, *adapter, None, 1.5, p, seed)
        return y, *_lora_linear_backward(dy, x, xa, base, *adapter, 1.5, p, seed, True)

    with use_backend("reference"):
        by_torch = forward_and_backward()
    with use_backend("triton"):
        again = forward_and_backward()
    with use_backend("triton"), guarded_memory(monkeypatch):
        got = forward_and_backward()
    names = ("y", "dx", "dlora_A", "dlora_B")
    exact = with_gradients(
        lambda x, lora_A, lora_B: plain_linear(x, w.double(), lora_A, lora_B, 1.5, p=p, seed=seed),
        {"x": x.double(), "lora_A": lora_A.double(), "lora_B": lora_B.double()},
        dy,
    )
    assert_as_accurate(dict(zip(names, got)), dict(zip(names, by_torch)), exact, dtype)
    for name, first, second in zip(names, got, again):
        assert torch.equal(first, second), f"{name} differs from run to run"


@pytest.mark.parametrize("library", [False, True], ids=["own-gemm", "library-gemm"])
@pytest.mark.parametrize(
    ("tokens", "most"),
    [
        (512, (4, 6, 6, 8)),  # in both ways, the second launch of a split sum is among them
        (16, (4, 6, 6, 8)),  # xAᵀ and the sum of its splits, the product, its epilogue: no dense W in forward
    ],
)
def test_launches_of_one_linear(tokens, most, library, monkeypatch):
    """Over NF4 in bf16, LoRA and DoRA, forward and backward; and PyTorch's operations: each keeps the host busy."""
    monkeypatch.setattr("kernels.triton.gemm.use_library", lambda x: library)
    x, dy, weight = meta(tokens, 4096, dtype="bf16"), meta(tokens, 4096, dtype="bf16"), meta_packed(4096, 4096)
    adapter, vector = (meta(16, 4096), meta(4096, 16)), meta(4096)
    xa, z, rest = meta(tokens, 16, dtype="bf16"), meta(0, dtype="bf16"), (2.0, 0.0, None)
    calls = (
        lambda: lora.lora_linear(x, weight, *adapter, None, *rest),
        lambda: lora.lora_linear_backward(dy, x, xa, weight, *adapter, *rest, True),
        lambda: dora.dora_linear(x, weight, vector, None, *adapter, vector, None, *rest),
        lambda: dora.dora_linear_backward(dy, x, xa, dy, z, vector, vector, weight, *adapter, vector, *rest, True),
    )
    for call, allowed in zip(calls, most, strict=True):
        with recording():
            call()  # tables of levels are made once
        with recording() as launches, Operations() as operations:
            call()
        assert len(launches) <= allowed, [launch.kernel.__name__ for launch in launches]
        assert len(operations.names) <= 16, operations.names


class Operations(TorchDispatchMode):
    """The names of PyTorch's operations in the block."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
