"""The Triton kernels of dora_linear where the tests of the op do not look: many tiles, memory, repeatability."""

import pytest
import torch

from kernels import Weight, use_backend, weight_norm_sq
from kernels.dora import _dora_linear, _dora_linear_backward
from tests.kernels.linear_cases import assert_as_accurate, make_base, plain_linear, randn, with_gradients
from tests.kernels.nf4_cases import embedded, guarded_memory, needs_triton


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize("variant", ["plain", "bias", "dropout"])
@pytest.mark.parametrize("kind", ["dense", "nf4-double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_kernels_over_many_tiles_write_all_of_their_outputs_and_nothing_else(dtype, kind, variant, monkeypatch):
    """Several tiles in each direction with tails, inputs between poison, outputs that held NaN before, and columns
    with m = 0 in more than one program."""
    # more tokens than the NF4 product takes; in fp16 ranks above 128 take a second tile
    tokens, in_features, out_features, rank = (70, 128, 68, 18) if dtype == torch.float32 else (140, 192, 270, 130)
    p, seed = (0.2 if variant == "dropout" else 0.0), torch.tensor(7)
    bias = randn(out_features, seed=5) if variant == "bias" else None
    x, dy = randn(tokens, in_features, seed=2, dtype=dtype), randn(tokens, out_features, seed=6, dtype=dtype)
    weight, state, w = make_base(kind, out_features, in_features, dtype)
    lora_A, lora_B = randn(rank, in_features, seed=3) / in_features**0.5, randn(out_features, rank, seed=4) / rank**0.5
    magnitude = randn(out_features, seed=8).abs() + 0.5
    magnitude[[3, 40, 41, -1]] = 0
    norm_sq = weight_norm_sq(weight, state)
    x, dy, weight, lora_A, lora_B, magnitude = (embedded(t, 64) for t in (x, dy, weight, lora_A, lora_B, magnitude))
    base, adapter = Weight(weight, state), (lora_A, lora_B, magnitude)

    def forward_and_backward():
        y, xa, norm, gain, z = _dora_linear(x, base, norm_sq, None, *adapter, bias, 1.5, p, seed)
        kept = None if variant != "plain" else y
        return y, *_dora_linear_backward(dy, x, xa, kept, z, norm, gain, base, *adapter, 1.5, p, seed, True)

    with use_backend("reference"):
        by_torch = forward_and_backward()
    with use_backend("triton"), guarded_memory(monkeypatch):
        got = forward_and_backward()
    with use_backend("triton"):
        again = forward_and_backward()
    names = ("y", "dx", "dlora_A", "dlora_B", "dmagnitude")
    exact = with_gradients(
        lambda x, lora_A, lora_B, magnitude: plain_linear(
            x, w.double(), lora_A, lora_B, 1.5, None if bias is None else bias.double(), magnitude, p, seed
        ),
        {"x": x.double(), "lora_A": lora_A.double(), "lora_B": lora_B.double(), "magnitude": magnitude.double()},
        dy,
    )
    assert_as_accurate(dict(zip(names, got)), dict(zip(names, by_torch)), exact, dtype)
    for name, first, second in zip(names, got, again):
        assert torch.equal(first, second), f"{name} differs from run to run"
