"""Products of few tokens with packed weights in Triton: accuracy, exactness, memory, repeatability, launches."""

import pytest
import torch

from kernels import QuantState, Weight, dequantize_4bit, dora_linear, quantize_4bit, use_backend, weight_norm_sq
from kernels.codebook import BLOCK_FORMATS, CODEBOOKS
from kernels.triton import dora, few_tokens, lora, nf4_gemv, nf4_linear, nf4_small_batch
from kernels.triton.case import meta, meta_packed
from kernels.triton.launch import recording
from kernels.triton.nf4_linear import product
from tests.kernels.linear_cases import assert_as_accurate, plain_linear, randn
from tests.kernels.nf4_cases import each_tensor, embedded, guarded_memory, needs_triton, triton_device

FP32, FP16 = torch.float32, torch.float16

# (tokens, out, in, blocksize, quant type, double quantization, dtype)
SHAPES = [
    # nf4_gemv: a warp a row, a lane without columns
    (1, 5, 992, 64, "nf4", True, FP16),
    # four warps a row, the last one with few columns; rows that begin within a block
    (3, 3, 3168, 128, "int4", True, FP32),
    # three trips of one warp; a partial last block
    (4, 3, 2080, 4096, "fp4", False, FP16),
    (2, 3, 96, 32, "nf4", False, FP32),
    # nf4_small_batch: rows beyond the last tile, columns beyond the last trip
    (5, 70, 160, 64, "nf4", True, FP16),
    (17, 130, 416, 32, "fp4", True, FP16),
    (64, 33, 288, 4096, "int4", False, FP16),
    # two blocks in 32 columns, for both
    (2, 5, 1056, 16, "nvfp4", True, FP16),
    (9, 70, 160, 16, "nvfp4", True, FP16),
]


def shape_id(shape) -> str:
    tokens, out_features, in_features, blocksize, quant_type, double, dtype = shape
    absmax = "double" if double else "single"
    return f"m{tokens}-{out_features}x{in_features}-b{blocksize}-{quant_type}-{absmax}-{str(dtype)[6:]}"


def packed(out_features: int, in_features: int, blocksize: int, quant_type: str, double: bool) -> Weight:
    w = randn(out_features, in_features, seed=1) / in_features**0.5
    return Weight(*quantize_4bit(w, blocksize, double, quant_type))


def embed(weight: Weight) -> Weight:
    """The same weight between poison."""

    def inside(tensor):
        return embedded(tensor, 64) if tensor.dim() else tensor

    state: QuantState = each_tensor(weight.quant_state, inside)
    return Weight(inside(weight.values), state)


@pytest.fixture(params=[1, 16], ids=["one split", "many splits"])
def most_splits(request, monkeypatch):
    """How often nf4_small_batch may split columns: without splits it makes more than one trip."""
    monkeypatch.setattr("kernels.triton.launch.MAX_SPLITS", request.param)
    return request.param


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_product_with_everything_in_its_epilogue(shape, most_splits, monkeypatch):
    """Against float64, inputs between poison, outputs that held NaN before; the same bits in a second run."""
    tokens, out_features, in_features, *of_weight, dtype = shape
    if most_splits == 1 and tokens <= nf4_linear.GEMV_TOKENS:
        pytest.skip("nf4_gemv splits no columns between programs")
    weight = packed(out_features, in_features, *of_weight)
    w = weight.dense(FP32)
    x, s = randn(tokens, in_features, seed=2, dtype=dtype), randn(tokens, 3, seed=3, dtype=dtype)
    lora_B, bias, gain = randn(out_features, 3, seed=4), randn(out_features, seed=5), randn(out_features, seed=6)

    def in_torch(dtype):
        z = x.to(dtype) @ w.to(dtype).t() + s.to(dtype) @ lora_B.to(dtype).t()
        return {"z": z, "y": gain.to(dtype) * z + bias.to(dtype)}

    guarded = [embedded(t, 64) for t in (x, s, lora_B, bias, gain)]

    def ours():
        x, s, lora_B, bias, gain = guarded
        return dict(zip("yz", product(x, poisoned, s, lora_B.t(), bias, gain, keep_z=True)))

    poisoned = embed(weight)
    with guarded_memory(monkeypatch):
        got = ours()
    assert_as_accurate(got, in_torch(dtype), in_torch(torch.float64), dtype)
    for name, again in ours().items():
        assert torch.equal(got[name], again), f"{name} differs from run to run"


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize(
    ("quant_type", "double"),
    [*((name, double) for name in CODEBOOKS for double in (False, True)), *((name, True) for name in BLOCK_FORMATS)],
)
@pytest.mark.parametrize(("tokens", "dtype"), [(2, FP32), (4, FP16), (64, FP16)])
def test_the_identity_gives_the_dequantized_weight(tokens, dtype, double, quant_type):
    in_features = 64
    blocksize = BLOCK_FORMATS[quant_type].blocksize if quant_type in BLOCK_FORMATS else 32
    weight = packed(21, in_features, blocksize, quant_type, double)
    x = torch.eye(in_features, dtype=dtype)[-tokens:]
    y, _ = product(x, weight)
    want = dequantize_4bit(weight.values, weight.quant_state, dtype).t()[-tokens:]
    torch.testing.assert_close(y, want, rtol=0, atol=0)


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize("tokens", [1, 7])
def test_adapter(tokens, monkeypatch):
    """xa against float64; the gain to the bit, 0 where the norm is 0."""
    x, lora_A = randn(tokens, 1100, seed=2, dtype=FP16), randn(1100, 5, seed=3).t()
    magnitude, norm = randn(1030, seed=4, dtype=FP16), randn(1030, seed=5).abs()
    norm[[3, -1]] = 0
    with guarded_memory(monkeypatch):
        xa, copy, gain = few_tokens.adapter(embedded(x, 64), lora_A, 1.5, magnitude, embedded(norm, 64))
    exact = {"xa": 1.5 * x.double() @ lora_A.double().t()}
    assert_as_accurate({"xa": xa}, {"xa": 1.5 * x @ lora_A.to(FP16).t()}, exact, FP16)
    assert torch.equal(copy, norm) and copy.data_ptr() != norm.data_ptr()
    assert torch.equal(gain, torch.where(norm == 0, 0, magnitude.float() / norm))
    xa_alone, *nothing = few_tokens.adapter(x, lora_A, 1.5)
    assert torch.equal(xa_alone, xa) and nothing == [None, None]


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_dora_with_a_norm_that_is_given(tokens, bias):
    weight = packed(6, 96, 64, "nf4", True)
    w = weight.dense(FP32)
    x = randn(tokens, 96, seed=2, dtype=FP16)
    lora_A, lora_B, magnitude = randn(4, 96, seed=3) / 10, randn(6, 4, seed=4), randn(6, seed=5)
    b = randn(6, seed=6) if bias else None
    norm = (w + 2.0 * lora_B @ lora_A).norm(dim=1)
    with use_backend("triton"):
        norm_sq = weight_norm_sq(weight)
        y = dora_linear(x, weight, norm_sq, lora_A, lora_B, magnitude, 2.0, b, norm=norm)

    def in_torch(dtype):
        b_there = None if b is None else b.to(dtype)
        return {"y": plain_linear(x.to(dtype), w.to(dtype), lora_A, lora_B, 2.0, b_there, magnitude)}

    assert_as_accurate({"y": y}, in_torch(FP16), in_torch(torch.float64), FP16)


@pytest.mark.parametrize(
    ("tokens", "dtype", "launches"),
    [(1, "bf16", 1), (4, "fp32", 1), (5, "bf16", 2), (64, "fp16", 2), (65, "bf16", 1), (5, "fp32", 1)],
)
def test_launches(tokens, dtype, launches):
    """LoRA, and DoRA whose norm is known, take one launch more than the product alone.

    Beyond few tokens W is dequantized, and the product alone is PyTorch's.
    """
    x, weight, vector = meta(tokens, 4096, dtype=dtype), meta_packed(4096, 4096), meta(4096)
    adapter = meta(16, 4096), meta(4096, 16)
    fused = launches == 2 or tokens <= nf4_linear.GEMV_TOKENS

    def count(call) -> int:
        with recording() as made:
            call()
        return len(made)

    assert count(lambda: nf4_linear.nf4_linear(x, weight, vector)) == launches
    if fused:
        with_lora = count(lambda: lora.lora_linear(x, weight, *adapter, vector, 2.0, 0.0, None))
        with_dora = count(lambda: dora.dora_linear(x, weight, vector, vector, *adapter, vector, vector, 2.0, 0.0, None))
        assert with_lora == with_dora == launches + 1


def test_rows_that_are_not_whole_words_are_dequantized():
    x, weight = meta(1, 72, dtype="bf16"), meta_packed(8, 72)
    assert not nf4_gemv.supports(x, weight) and not nf4_small_batch.supports(x, weight)
    with recording() as made:
        nf4_linear.nf4_linear(x, weight, None)
    assert [launch.kernel.__name__ for launch in made] == ["_dequantize_kernel"]


@needs_triton
@pytest.mark.parametrize("tokens", [1, 5])
def test_codes_that_are_not_aligned(tokens):
    """A slice of a bigger buffer: kernels read words, so it is copied first."""
    with torch.device(triton_device()):
        weight = packed(4, 64, 64, "nf4", False)
        moved = torch.cat([weight.values[:1], weight.values])[1:]
        x = randn(tokens, 64, seed=2, dtype=FP16)
        assert torch.equal(product(x, Weight(moved, weight.quant_state))[0], product(x, weight)[0])
