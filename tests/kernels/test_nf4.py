"""NF4: the reference and the CPU kernels are bitsandbytes byte for byte, the Triton kernels the reference.

There is no tolerance anywhere in this file. bitsandbytes is asked on the CPU and for flat tensors only: its AVX-512
code indexes absmax by row and is wrong where a block crosses rows. Two more of its answers depend on the processor and
are left out: which bf16 a NaN becomes (without AVX-512 some NaNs become -0; ours stay NaN) and subnormal bf16 results
(zero on AVX-512 BF16).
"""

import pytest
import torch

from kernels import QuantState, Weight, dequantize_4bit, quantize_4bit, use_backend
from kernels.codebook import BLOCKSIZES, decision_bounds, levels
from kernels.nf4 import _dequantize_4bit, _quantize_4bit
from kernels.reference import nf4 as reference
from tests.kernels.linear_cases import opcheck
from tests.kernels.nf4_cases import (
    DTYPES,
    KINDS,
    assert_same,
    bnb_dequantize,
    bnb_quantize,
    each_tensor,
    embedded,
    guarded_memory,
    needs_triton,
    only_supported,
    skip_bf16_in_interpreter,
    triton_device,
    weights,
)

# numpy, in the interpreter, warns about 1 / 0 and inf · 0, which are among the special values tested.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
kinds = pytest.mark.parametrize("kind", KINDS)
blocksizes = pytest.mark.parametrize("blocksize", BLOCKSIZES, ids="b{}".format)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])


def lengths(blocksize: int) -> tuple[int, ...]:
    """None, one, less than a block, whole blocks, an odd number over many blocks."""
    many = 301 if blocksize <= 256 else 37  # 301 absmax fill more than one nested block
    return 0, 1, blocksize - 1, blocksize, 4 * blocksize, many * blocksize + 17


# ------------------------------------------------------------------------ reference ↔ bitsandbytes

columns = pytest.mark.parametrize("column", ["reference", "cpu"])


@columns
@kinds
@blocksizes
@dtypes
def test_quantizes_as_bitsandbytes(dtype, blocksize, kind, column):
    inputs = [weights(n, kind, dtype, blocksize) for n in lengths(blocksize)]
    for w in only_supported(_quantize_4bit, column, inputs, blocksize, "nf4"):
        n = len(w)
        for double_quant in (False, True):
            with use_backend(column):
                packed, state = quantize_4bit(w, blocksize, double_quant)
            bnb_packed, bnb_state = bnb_quantize(w, blocksize, double_quant)
            what = f"n={n}{' double' * double_quant}"
            assert_same(packed, bnb_packed, f"{what}: packed")
            assert_same(state.absmax, bnb_state.absmax, f"{what}: absmax")
            if double_quant:
                assert_same(state.nested_absmax, bnb_state.state2.absmax, f"{what}: nested_absmax")
                assert_same(state.nested_offset, bnb_state.offset, f"{what}: nested_offset")


@columns
@double_quants
@blocksizes
@dtypes
def test_dequantizes_as_bitsandbytes(dtype, blocksize, double_quant, column):
    inputs, theirs = [], {}
    for kind in KINDS:
        for n in lengths(blocksize)[1:]:  # bitsandbytes refuses an empty tensor
            bnb_packed, bnb_state = bnb_quantize(weights(n, kind, blocksize=blocksize), blocksize, double_quant)
            nested = (bnb_state.state2.absmax, bnb_state.offset) if double_quant else ()
            state = QuantState(bnb_state.absmax, torch.Size([n]), dtype, blocksize, *nested)
            inputs.append(Weight(bnb_packed, state))
            theirs[id(inputs[-1])] = kind, bnb_state
    for weight in only_supported(_dequantize_4bit, column, inputs, dtype):
        kind, bnb_state = theirs[id(weight)]
        with use_backend(column):
            w = dequantize_4bit(weight)
        bnb_w = bnb_dequantize(weight.values, bnb_state, dtype)
        if dtype == torch.bfloat16:
            bnb_w = torch.where(w.isnan() & ((bnb_w == 0) | bnb_w.isnan()), w, bnb_w)
        assert_same(w, bnb_w, f"n={len(w)} {kind}")


# ------------------------------------------------------------------------- Triton ↔ reference


# One program takes 16384 values: none, one, a tail alone, several tiles with a tail, exactly one program, two, and two
# with a partial block that is divided in several parts.
KERNEL_LENGTHS = (0, 1, 31, 4129, 16384, 16384 + 37, 16384 + 2999)


@needs_triton
@pytest.mark.parametrize("n", KERNEL_LENGTHS, ids="n{}".format)
@blocksizes
@dtypes
def test_the_triton_kernel_quantizes_as_the_reference(dtype, blocksize, n):  # bf16 too: the interpreter reads it right
    for kind in ("normal", "nan") if n else ("normal",):
        w = weights(n, kind, dtype, blocksize)
        with use_backend("triton"):
            packed, state = quantize_4bit(w.to(triton_device()), blocksize)
        want_packed, want_absmax = reference.quantize_4bit(w, blocksize, "nf4")
        assert_same(packed, want_packed, f"{kind}: packed")
        assert_same(state.absmax, want_absmax, f"{kind}: absmax")


@needs_triton
@pytest.mark.parametrize("n", KERNEL_LENGTHS, ids="n{}".format)
@blocksizes
@dtypes
def test_the_triton_kernel_dequantizes_as_the_reference(dtype, blocksize, n):
    skip_bf16_in_interpreter(dtype)
    for double_quant in (False, True):
        packed, state = quantized(n, "nan" if n == 4129 else "normal", blocksize, double_quant)
        with use_backend("triton"):
            w = dequantize_4bit(packed, state, dtype)
        assert_same(w, dequantized(packed, state, dtype), f"double_quant={double_quant}")


def quantized(n: int, kind: str, blocksize: int, double_quant: bool) -> tuple[torch.Tensor, QuantState]:
    """Codes and state made by the reference, on the device where the kernels run."""
    with use_backend("reference"):
        packed, state = quantize_4bit(weights(n, kind, blocksize=blocksize), blocksize, double_quant)
    device = triton_device()
    return packed.to(device), each_tensor(state, lambda tensor: tensor.to(device))


def dequantized(packed, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The reference's answer."""
    return reference.dequantize_4bit(Weight(packed.cpu(), each_tensor(state, torch.Tensor.cpu)), dtype)


@needs_triton
@double_quants
@pytest.mark.parametrize("before", [1, 3, 4, 64], ids="offset{}".format)
def test_the_triton_kernels_read_and_write_their_own_memory_only(monkeypatch, before, double_quant):
    blocksize, n = 64, 16384 + 4096 + 77
    w = embedded(weights(n).to(triton_device()), before)
    packed, state = quantized(n, "normal", blocksize, double_quant)
    state = each_tensor(state, lambda tensor: embedded(tensor, before))
    with use_backend("triton"), guarded_memory(monkeypatch):
        got, got_state = quantize_4bit(w, blocksize, double_quant)
        got_w = dequantize_4bit(embedded(packed, before), state, torch.float16)
    assert_same(got, packed, "packed")
    if triton_device() == "cpu" or not double_quant:  # the mean of absmax is another sum on a GPU
        assert_same(got_state.absmax, state.absmax, "absmax")
    assert_same(got_w, dequantized(packed, state, torch.float16), "dequantized")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="2^31 values need a GPU")
def test_more_than_2_31_values():
    n = 2**31 + 16384 + 37
    w = torch.zeros(n, dtype=torch.float16, device="cuda")
    tail = weights(100_000, dtype=torch.float16)
    w[-len(tail) // 64 * 64 :] = 0
    start = n // 64 * 64 - 64 * 1000
    w[start:] = tail[: n - start].cuda()
    packed, state = quantize_4bit(w)
    want_packed, want_absmax = reference.quantize_4bit(w[start:].cpu(), 64, "nf4")
    assert_same(packed[start // 2 :], want_packed, "packed")
    assert_same(state.absmax[start // 64 :], want_absmax, "absmax")
    back = dequantize_4bit(packed, state)
    want_state = QuantState(want_absmax, torch.Size([n - start]), torch.float16, 64)
    assert_same(back[start:], dequantized(want_packed, want_state, torch.float16), "dequantized")


# --------------------------------------------------------------------------------- decision bounds


ALL_COLUMNS = ["reference", "cpu", pytest.param("triton", marks=needs_triton)]
backend_names = pytest.mark.parametrize("backend_name", ALL_COLUMNS)


def at_the_bounds(absmax: float, blocksize: int) -> torch.Tensor:
    """Values whose quotient by absmax is on, or a few units in the last place from, every bound, level and bin edge."""
    x = torch.cat([decision_bounds("nf4")[0], levels("nf4"), (torch.arange(33) - 16) / 16 + 1 / 32]).clamp(-1, 1)
    near = [x * absmax]
    for direction in (-torch.inf, torch.inf):
        y = x * absmax
        for _ in range(3):
            y = torch.nextafter(y, torch.tensor(direction))
            near.append(y)
    values = torch.cat(near).clamp(-absmax, absmax)
    rows = values.new_full((-(-len(values) // (blocksize - 1)), blocksize), absmax)
    rows.view(-1)[: len(values)] = values
    rows[:, -1] = absmax
    return rows.view(-1)


@backend_names
@pytest.mark.parametrize("absmax", [1.0, 3.0, 0.0123, 7e-39, 3e38], ids="absmax{}".format)
def test_codes_at_the_decision_bounds(absmax, backend_name):
    full = at_the_bounds(absmax, 32)
    inputs = (full, full[:-5], torch.cat([full, full[:31]]))  # full blocks multiply by 1 / absmax, partial ones divide
    for w in only_supported(_quantize_4bit, backend_name, inputs, 32, "nf4"):
        bnb_packed, bnb_state = bnb_quantize(w, 32, False)
        with use_backend(backend_name):
            packed, state = quantize_4bit(w.to(triton_device() if backend_name == "triton" else "cpu"), 32)
        assert_same(packed, bnb_packed, "packed")
        assert_same(state.absmax, bnb_state.absmax, "absmax")


@backend_names
def test_special_values(backend_name):
    inf, nan = torch.inf, torch.nan
    blocks = torch.ones(5, 32)
    blocks[0], blocks[1, 3], blocks[2, 4], blocks[3, 5:7] = 0.0, -inf, nan, torch.tensor([nan, inf])
    w = torch.cat([blocks.view(-1), torch.zeros(7)])  # and a partial block of zeros
    device = triton_device() if backend_name == "triton" else "cpu"
    with use_backend(backend_name):
        packed, state = quantize_4bit(w.to(device), 32)
        back = dequantize_4bit(packed, state).cpu()
    packed = packed.cpu()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: len(w)]
    blocks, tail = codes[:160].view(5, 32), codes[160:]
    assert (blocks[0] == 7).all() and (tail == 7).all()
    assert blocks[1, 3] == 15 and (blocks[1].sum() == 31 * 7 + 15)
    assert (blocks[2:4] == 15).all() and (blocks[4] == 15).all()
    assert_same(state.absmax, torch.tensor([0.0, inf, nan, nan, 1.0, 1e-38]), "absmax")
    back_blocks, back_tail = back[:160].view(5, 32), back[160:]
    assert (back_blocks[0] == 0).all() and (back_tail == 0).all() and (back_blocks[4] == 1).all()
    assert not back_blocks[1:4].isfinite().any()


# -------------------------------------------------------------------- the ops: shapes, layout, errors


@pytest.mark.usefixtures("backend")
def test_non_contiguous_input_is_quantized_as_its_copy():
    w = weights(48 * 50).to(torch.get_default_device()).view(48, 50)
    for view in (w.t(), w[:, ::3], w[5:, 1:]):
        packed, state = quantize_4bit(view, 32)
        copy_packed, copy_state = quantize_4bit(view.contiguous(), 32)
        assert torch.equal(packed, copy_packed) and torch.equal(state.absmax, copy_state.absmax)
        assert dequantize_4bit(packed, state).shape == view.shape


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 4)], ids=str)
def test_shapes_and_dtypes(shape):
    w = torch.ones(shape, dtype=torch.float16)
    packed, state = quantize_4bit(w, 32, double_quant=True)
    assert packed.shape == (-(-w.numel() // 2),) and packed.dtype == torch.uint8
    assert state.absmax.dtype == torch.uint8 and state.nested_offset.shape == ()
    back = dequantize_4bit(packed.view(-1, 1), state)
    assert back.shape == shape and back.dtype == torch.float16
    if w.numel():  # a single nested block whose values are all the mean: exact
        assert (back == 1).all()


@pytest.mark.usefixtures("backend")
@double_quants
def test_opcheck(double_quant):
    w = weights(1000).to(torch.get_default_device())
    opcheck(_quantize_4bit, w, 64, "nf4")
    weight = Weight(*quantize_4bit(w.view(10, 100), 64, double_quant))
    opcheck(_dequantize_4bit, weight, torch.float32)


@double_quants
def test_meta_device(double_quant):
    packed, state = quantize_4bit(torch.empty(33, 7, device="meta"), 32, double_quant)
    assert packed.device.type == "meta" and packed.shape == (116,) and state.absmax.shape == (8,)
    back = dequantize_4bit(packed, state, torch.bfloat16)
    assert back.device.type == "meta" and back.shape == (33, 7) and back.dtype == torch.bfloat16


def test_quantize_refuses():
    with pytest.raises(ValueError, match="blocksize 48 is not one of 32, 64"):
        quantize_4bit(torch.ones(64), 48)
    with pytest.raises(ValueError, match=r"w is torch\.float64"):
        quantize_4bit(torch.ones(64, dtype=torch.float64))
    with pytest.raises(ValueError, match="quant_type 'nf5' is not one of nf4, fp4, int4"):
        quantize_4bit(torch.ones(64), quant_type="nf5")


def test_dequantize_refuses():
    packed, state = quantize_4bit(torch.ones(4, 64), 64)
    nested_packed, nested = quantize_4bit(torch.ones(4, 64), 64, double_quant=True)

    def change(state: QuantState, **fields) -> QuantState:
        return QuantState(**{name: getattr(state, name) for name in state.__dataclass_fields__} | fields)

    cases = [
        (packed.view(torch.int8), state, "packed: 128 values of torch.int8"),
        (packed[:-1], state, "packed: 127 values"),
        (torch.stack([packed, packed], dim=1)[:, 0], state, "packed is not contiguous"),
        (packed, change(state, blocksize=16), "blocksize 16 is not one of"),
        (packed, change(state, quant_type="fp8"), "quant_type 'fp8' is not one of nf4, fp4"),
        (packed, change(state, blocksize=32), r"absmax: 4 values .* needs 8 of torch.float32"),
        (packed, change(state, shape=torch.Size([5, 64])), r"shape \(5, 64\) .* needs 160 of torch.uint8"),
        (packed, change(state, absmax=state.absmax.double()), "absmax: 4 values of torch.float64"),
        (packed, change(state, nested_offset=torch.ones(())), "nested_offset is given without nested_absmax"),
        (nested_packed, change(nested, nested_offset=None), "nested_offset: nothing"),
        (nested_packed, change(nested, nested_absmax=torch.ones(2)), "nested_absmax: 2 values"),
        (nested_packed, change(nested, absmax=state.absmax), "absmax: 4 values of torch.float32"),
        (packed, change(state, absmax=state.absmax.to("meta")), "absmax is on meta but packed on"),
    ]
    for codes, bad_state, message in cases:
        with pytest.raises(ValueError, match=message):
            dequantize_4bit(codes, bad_state)
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        dequantize_4bit(packed, state, torch.float64)
