"""MXFP4 and NVFP4, quantized and dequantized by every column: against their rules in float64, and byte for byte against
numbers that torchao 0.18.0 (MXFP4) and ModelOpt 0.47.0 (NVFP4) made of the same weights.
"""

import math

import pytest
import torch

from kernels import QuantState, Weight, dequantize_4bit, quantize_4bit, use_backend
from kernels.codebook import BLOCK_FORMATS, absmax_map, quant_types
from kernels.nf4 import _encode_4bit
from tests.kernels.nf4_cases import DTYPES, assert_same, needs_triton, only_supported, triton_device, weights

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

BLOCKSIZES = {"mxfp4": 32, "nvfp4": 16}
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The value of each code, by its bits: a sign, two exponent bits and one mantissa bit."""
    sign, exponent, mantissa = codes >> 3, (codes >> 1 & 3).double(), (codes & 1).double()
    size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2 ** (exponent - 1))
    return torch.where(sign == 1, -size, size)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Codes in their order: the even one is in the high nibble."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)


def as_in_files(packed: torch.Tensor) -> str:
    """Bytes as the formats' own files have them: the even code in the low nibble."""
    return (packed << 4 | packed >> 4).numpy().tobytes().hex()


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Codes of the levels nearest to float64 x; a tie goes to the even code, what is too large to the largest."""
    distance = (x.abs()[:, None] - MAGNITUDES).abs() + (torch.arange(8) % 2) * 1e-12
    code = distance.argmin(dim=1).to(torch.uint8)
    return code + (x < 0).to(torch.uint8) * 8


def blocks_of(w: torch.Tensor, size: int) -> torch.Tensor:
    flat = w.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def scales_by_rule(w: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, float]:
    """(scale bytes, the tensor's number), a block at a time, in Python's floats."""
    largest = blocks_of(w, BLOCKSIZES[quant_type]).abs().amax(dim=1).tolist()
    if quant_type == "mxfp4":
        return torch.tensor([max(math.frexp(m)[1] - 1 - 2 + 127, 0) if m else 0 for m in largest]), 1.0
    tensor = torch.tensor(max(largest), dtype=torch.float32) / (6.0 * 448.0)
    scale = [torch.tensor(m, dtype=torch.float32) / (6.0 * tensor) if m else torch.tensor(1.0) for m in largest]
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # ascending
    nearest = [max(1, ((finite - s.double()).abs() + (torch.arange(127) % 2) * 1e-12).argmin().item()) for s in scale]
    return torch.tensor(nearest), tensor.item()


def inputs(quant_type: str, dtype: torch.dtype) -> list[torch.Tensor]:
    size = BLOCKSIZES[quant_type]
    halves = torch.randint(-26, 27, (40 * size,), generator=torch.Generator().manual_seed(3)) / 4  # many ties
    zeros = weights(9 * size, "normal", torch.float32, size)
    zeros[: 2 * size], zeros[5 * size : 6 * size] = 0, zeros[5 * size : 6 * size] * 1e-7
    sizes = (1, size - 1, size, size + 1, 2 * size + 17, 300 * size + 31, 20_000)
    return [*(weights(n, "normal", dtype, size) for n in sizes), halves.to(dtype), zeros.to(dtype)]


# ------------------------------------------------------------------------------------------ quantize


@pytest.mark.parametrize("quant_type", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_quantizing_follows_the_formats_rules(quant_type, dtype):
    size = BLOCKSIZES[quant_type]
    for w in inputs(quant_type, dtype):
        with use_backend("reference"):
            packed, state = quantize_4bit(w, quant_type=quant_type)
        assert (state.blocksize, state.absmax.dtype, state.nested_offset.item()) == (size, torch.uint8, 0)
        codes, tensor = scales_by_rule(w.float(), quant_type)
        assert torch.equal(state.absmax.long(), codes)
        assert (state.nested_absmax == tensor).all() and len(state.nested_absmax) == -(-len(codes) // 256)
        scale = (absmax_map(quant_type)[codes] * tensor).double()
        exact = rounded((blocks_of(w.double(), size) / scale[:, None]).view(-1))[: w.numel()]
        found = unpacked(packed)[: w.numel()]
        differ = found != exact  # only where the fp32 quotient of NVFP4 falls on a tie that the exact one misses
        assert differ.sum() <= w.numel() / 2000 and (quant_type == "nvfp4" or not differ.any())


def test_all_zeros_and_no_values():
    for quant_type in BLOCK_FORMATS:
        for w in (torch.zeros(100), torch.empty(0)):
            packed, state = quantize_4bit(w, quant_type=quant_type)
            assert not packed.any() and torch.equal(dequantize_4bit(packed, state), w)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_visible(bad):
    w = weights(4096)
    w[100] = bad
    back = dequantize_4bit(*quantize_4bit(w, quant_type="mxfp4"))
    assert back[96:128].isnan().all() and back[:96].isfinite().all() and back[128:].isfinite().all()
    assert not dequantize_4bit(*quantize_4bit(w, quant_type="nvfp4")).isfinite().any()


@pytest.mark.parametrize("column", ["cpu", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("quant_type", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_column_gives_the_references_bytes(quant_type, dtype, column):
    device = triton_device() if column == "triton" else "cpu"
    if column == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    found = [*inputs(quant_type, dtype), weights(1000, "nan", dtype), weights(1000, "infinite", dtype)]
    found = only_supported(_encode_4bit, column, found, torch.ones(1), BLOCKSIZES[quant_type], quant_type)
    for w in found:
        with use_backend("reference"):
            packed, state = quantize_4bit(w, quant_type=quant_type)
            back = dequantize_4bit(packed, state)
        with use_backend(column):
            got, got_state = quantize_4bit(w.to(device), quant_type=quant_type)
            assert_same(got, packed, "packed")
            assert_same(got_state.absmax, state.absmax, "scales")
            assert_same(dequantize_4bit(got, got_state), back, "dequantized")


# ---------------------------------------------------------------------------------------- dequantize


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("quant_type", BLOCK_FORMATS)
def test_every_code_under_every_scale(quant_type, dtype, backend):
    """The number is level · scale, rounded once: all sixteen codes with all 256 scales."""
    size = BLOCKSIZES[quant_type]
    codes = torch.arange(16, dtype=torch.uint8).repeat(256 * size // 16)
    scales = torch.arange(256, dtype=torch.uint8)
    nested = torch.tensor([0.37 if quant_type == "nvfp4" else 1.0])
    state = QuantState(scales, torch.Size([256 * size]), dtype, size, nested, torch.zeros(()), quant_type=quant_type)
    if quant_type == "mxfp4":
        exact = torch.tensor([2.0 ** (i - 127) if i < 255 else math.nan for i in range(256)], dtype=torch.float64)
    else:
        exact = (scales.view(torch.float8_e4m3fn).float() * nested + 0).double()  # a scale of -0 is 0
    want = (e2m1(codes).view(256, size) * exact[:, None]).float().to(dtype).view(-1)
    got = dequantize_4bit((codes[::2] << 4 | codes[1::2]).contiguous(), state, dtype)
    assert_same(got, want, "dequantized")


# ----------------------------------------------------------------------------------- other libraries


def known_weights() -> torch.Tensor:
    w = ((torch.arange(64) * 37 + 11) % 101 - 50).float() / 8 * torch.tensor([1.0, 0.004]).repeat_interleave(32)
    first = [0.75, -0.25, 3.5, -5.0, 0.2, -0.1, 1.75, 6.0, 2.5, -2.5, 0.0, 0.3, 0.25, 1.25, 5.0, -6.0]
    w[:16] = torch.tensor(first)  # ties among them
    return w


def test_mxfp4_is_torchaos():
    packed, state = quantize_4bit(known_weights(), quant_type="mxfp4")
    assert as_in_files(packed) == "82e68074c41020f6c7f56a1ed7f45b9ee6724dbfe5603dc7f56a1ed7735c9fe6"
    assert state.absmax.tolist() == [127, 119]


def test_nvfp4_is_modelopts():
    packed, state = quantize_4bit(known_weights(), quant_type="nvfp4")
    assert as_in_files(packed) == "92f68074d51031f7c7f5691ed6f35b9ee6724dbfe6603ec7f46a1ed6735b9fe6"
    assert state.absmax.tolist() == [125, 126, 61, 62]
    assert state.nested_absmax.tolist() == [float.fromhex("0x1.30c30c0000000p-9")]


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "how, message",
    [
        ({"blocksize": 64, "quant_type": "mxfp4"}, "blocksize 64: mxfp4 has blocks of 32"),
        ({"blocksize": 32, "quant_type": "nvfp4"}, "blocksize 32: nvfp4 has blocks of 16"),
        ({"double_quant": False, "quant_type": "nvfp4"}, "double_quant=False: nvfp4 has scales of 8 bits"),
        ({"blocksize": 16}, "blocksize 16 is not one of 32, 64"),
        ({"quant_type": "mxfp8"}, "quant_type 'mxfp8' is not one of nf4, fp4, int4, mxfp4, nvfp4"),
    ],
)
def test_what_a_format_fixes_cannot_be_changed(how, message):
    with pytest.raises(ValueError, match=message):
        quantize_4bit(torch.ones(64), **how)


def test_a_state_without_scales_is_refused():
    packed, _ = quantize_4bit(torch.ones(64), 32)
    with pytest.raises(ValueError, match="double_quant=False: mxfp4 has scales of 8 bits"):
        Weight(packed, QuantState(torch.ones(2), torch.Size([64]), torch.float32, 32, quant_type="mxfp4"))


@pytest.mark.usefixtures("backend")
def test_opcheck():
    w, scale = torch.randn(96), torch.ones(6)
    torch.library.opcheck(torch.ops.qdora.encode_4bit.default, (w, scale, 16, "nvfp4"))


def test_the_names_of_all_types():
    assert quant_types() == ("nf4", "fp4", "int4", "mxfp4", "nvfp4")
