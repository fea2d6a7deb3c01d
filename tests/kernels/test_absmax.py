"""Double quantization: the reference is bitsandbytes byte for byte, the kernels are the reference byte for byte.

There is no tolerance anywhere in this file. The answer of bitsandbytes' CPU library does not depend on AVX-512; on
other processors than x86 a NaN may spread to the block's maximum.
"""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from kernels import cpu, dequantize_absmax, quantize_absmax, use_backend
from kernels.absmax import _dequantize_absmax
from kernels.codebook import dynamic_codes, dynamic_map
from kernels.reference import absmax as reference
from tests.kernels.nf4_cases import assert_same, embedded, guarded_memory, needs_triton, triton_device

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

LENGTHS = (0, 1, 2, 255, 256, 257, 1023, 13824)
KINDS = ("normal", "constant", "zeros", "denormal", "huge", "infinite", "nan")


def block_maxima(n: int, kind: str) -> Tensor:
    """n absmax values as a weight has them, on the CPU, or special ones."""
    absmax = torch.randn(n, generator=torch.Generator().manual_seed(n), device="cpu").abs() * 0.02 + 0.05
    if kind == "constant":
        absmax[:] = 0.1
    if kind == "zeros":
        absmax[: n // 2 + 1] = 0
    if kind == "denormal":
        absmax *= 1e-38
    if kind == "huge":
        absmax *= 1e37
    if kind == "infinite":
        absmax[n // 3 :: 100] = torch.inf
    if kind == "nan":
        absmax[n // 3 : n // 3 + 1] = torch.nan
    return absmax


def bnb_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `bitsandbytes.functional.quantize_4bit(…, compress_statistics=True)` does it to its absmax."""
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    return codes, state.absmax, offset


def assert_all_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, mine, theirs in zip(("codes", "nested_absmax", "nested_offset"), got, want):
        assert_same(mine, theirs, name)


def test_the_map_is_bitsandbytes():
    assert_same(dynamic_map(), bnb.create_dynamic_map(), "map")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS, ids="n{}".format)
def test_the_reference_equals_bitsandbytes(n, kind):
    absmax = block_maxima(n, kind)
    with use_backend("reference"):
        got = quantize_absmax(absmax)
        back = dequantize_absmax(*got)
    codes, nested_absmax, offset = bnb_quantize(absmax)
    assert_all_same(got, (codes, nested_absmax, offset))
    state = bnb.QuantState(absmax=nested_absmax, code=dynamic_map(), blocksize=256, dtype=torch.float32)
    assert_same(back, bnb.dequantize_blockwise(codes, state) + offset, "dequantized")


def test_every_code_is_chosen_as_bitsandbytes_chooses_it():
    """Values dense around the edges between the table's 65536 points, where one rounding decides the code."""
    edge = (torch.arange(1, 65536, dtype=torch.float64) - 0.5) / 32767.5 - 1
    ulps = torch.tensor([-3e-7, -1.2e-7, -6e-8, 0, 6e-8, 1.2e-7, 3e-7], dtype=torch.float64)
    x = (edge[:, None] + ulps).float().view(-1)
    rows = x[: len(x) // 254 * 254].view(-1, 254)
    one = torch.ones(len(rows), 1)
    absmax = torch.cat([rows, one, -one], dim=1).view(-1)  # each block of 256 spans [-1, 1]
    got = reference.quantize_absmax(absmax)
    assert_all_same(got, bnb_quantize(absmax))
    assert got[0].unique().numel() > 200  # next to 0 the map is finer than the table's points


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS[:-1], ids="n{}".format)
def test_the_triton_kernels_equal_the_reference(n, kind):
    absmax = block_maxima(n, kind).to(triton_device())
    with use_backend("triton"):
        got = quantize_absmax(absmax)
        back = dequantize_absmax(*got)
    assert_all_same(got, reference.quantize_absmax(absmax))
    assert_same(back, reference.dequantize_absmax(*got, "nf4"), "dequantized")


@needs_triton
@pytest.mark.parametrize("before", [1, 16], ids="offset{}".format)
def test_the_triton_kernels_read_and_write_their_own_memory_only(monkeypatch, before):
    absmax = embedded(block_maxima(700, "normal").to(triton_device()), before)
    want = reference.quantize_absmax(absmax)
    with use_backend("triton"), guarded_memory(monkeypatch):
        got = quantize_absmax(absmax)
        back = dequantize_absmax(*(embedded(t, before) for t in want))
    assert_all_same(got, want)
    assert_same(back, reference.dequantize_absmax(*want, "nf4"), "dequantized")


def test_a_lost_absmax_is_seen():
    """An infinity or a NaN makes every value NaN or infinite: never a wrong finite number."""
    for kind in ("infinite", "nan"):
        back = dequantize_absmax(*quantize_absmax(block_maxima(700, kind)))
        assert not back.isfinite().any()


def test_the_table_maps_zero_to_the_code_of_its_nearest_point():
    assert dynamic_codes()[[0, 32767, 32768, 65535]].tolist() == [0, 123, 131, 255]
    assert dynamic_map()[127] == 0


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels cannot run here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS, ids="n{}".format)
def test_the_cpu_kernel_dequantizes_as_the_reference(n, kind):
    codes = reference.quantize_absmax(block_maxima(n, kind))
    with use_backend("cpu"):
        assert _dequantize_absmax.column(*codes, "nf4") == "cpu"
        back = dequantize_absmax(*codes)
    assert_same(back, reference.dequantize_absmax(*codes, "nf4"), "dequantized")


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels cannot run here")
@pytest.mark.parametrize("n", [1, 256, 700])
def test_the_cpu_kernel_dequantizes_any_codes_to_the_last_bit(n):
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(256, (n,), dtype=torch.uint8, generator=generator)
    nested, offset = torch.rand(-(-n // 256), generator=generator), torch.rand((), generator=generator)
    exact = dynamic_map("cpu")[codes.long()] * nested.repeat_interleave(256)[:n] + offset
    with use_backend("cpu"):
        assert _dequantize_absmax.column(codes, nested, offset, "nf4") == "cpu"
        assert torch.equal(dequantize_absmax(codes, nested, offset), exact)


@pytest.mark.usefixtures("backend")
def test_opcheck_of_quantize():
    absmax = block_maxima(300, "normal").to(torch.get_default_device())
    torch.library.opcheck(torch.ops.qdora.quantize_absmax.default, (absmax,))


@pytest.mark.usefixtures("backend")
def test_opcheck_of_dequantize():
    absmax = block_maxima(300, "normal").to(torch.get_default_device())
    torch.library.opcheck(torch.ops.qdora.dequantize_absmax.default, (*reference.quantize_absmax(absmax), "nf4"))


@pytest.mark.usefixtures("backend")
def test_non_contiguous_input_is_quantized_as_its_copy():
    absmax = block_maxima(600, "normal").to(torch.get_default_device())[::2]
    assert_all_same(quantize_absmax(absmax), quantize_absmax(absmax.contiguous()))


def test_meta_device():
    codes, nested_absmax, offset = quantize_absmax(torch.empty(300, device="meta"))
    assert (codes.shape, nested_absmax.shape, offset.shape) == ((300,), (2,), ())
    assert codes.dtype == torch.uint8 and codes.device.type == "meta"
    assert dequantize_absmax(codes, nested_absmax, offset).shape == (300,)


def test_refuses():
    for bad in (torch.ones(3, dtype=torch.float16), torch.ones(3, 3), torch.ones(())):
        with pytest.raises(ValueError, match=r"absmax must be float32 \[blocks\], not"):
            quantize_absmax(bad)
    codes, nested_absmax, offset = quantize_absmax(torch.ones(300))
    cases = [
        ((codes.int(), nested_absmax, offset), "codes must be contiguous torch.uint8"),
        ((codes.view(30, 10), nested_absmax, offset), r"codes must be .* not torch.uint8 \[30, 10\]"),
        ((codes[::2], nested_absmax, offset), "codes must be contiguous .* with strides"),
        ((codes, nested_absmax[:1], offset), r"nested_absmax must be contiguous torch.float32 \[2\] for 300 codes"),
        ((codes, nested_absmax.double(), offset), "nested_absmax must be"),
        ((codes, nested_absmax, offset.view(1)), r"nested_offset must be contiguous torch.float32 \[\]"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError, match=message):
            dequantize_absmax(*args)
