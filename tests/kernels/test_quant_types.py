"""The 4-bit data types beside NF4: FP4 byte for byte bitsandbytes', INT4 against numpy, any table; NormalFloats.

As in test_nf4.py there is no tolerance where bytes are compared. bitsandbytes' FP4 has two codes for zero: 8 for what
lies just above it, 0 for it and what lies just below; here too.
"""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kernels import (
    QuantState,
    codebook,
    dequantize_4bit,
    dora_linear,
    dora_norm,
    lora_linear,
    nf4_linear,
    quantize_4bit,
    use_backend,
    weight_norm_sq,
)
from kernels.codebook import (
    BITSANDBYTES_TYPES,
    CODEBOOKS,
    NF4_LEVELS,
    code_table,
    decision_bounds,
    levels,
    normal_float,
)
from kernels.nf4 import _quantize_4bit
from tests.kernels.nf4_cases import (
    DTYPES,
    KINDS,
    assert_same,
    bnb_dequantize,
    bnb_quantize,
    needs_triton,
    only_supported,
    weights,
)
from tests.kernels.nf4_cases import triton_device as device_of_kernels

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

EVENLY_SPACED = tuple(-1 + 2 * i / 15 for i in range(16))


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)


def on_both(w: torch.Tensor, blocksize: int, double_quant: bool, quant_type: str):
    """(packed, state, w') of the reference, after the Triton kernels have given the same bytes."""
    with use_backend("reference"):
        packed, state = quantize_4bit(w, blocksize, double_quant, quant_type)
        back = dequantize_4bit(packed, state)
    with use_backend("triton"):
        got, got_state = quantize_4bit(w.to(device_of_kernels()), blocksize, double_quant, quant_type)
        assert_same(got, packed, "packed")
        assert got_state.quant_type == quant_type
        if device_of_kernels() == "cpu" or not double_quant:  # the mean of absmax is another sum on a GPU
            assert_same(got_state.absmax, state.absmax, "absmax")
            assert_same(dequantize_4bit(got, got_state), back, "dequantized")
    return packed, state, back


# -------------------------------------------------------------------------------------------- FP4


@pytest.mark.parametrize("column", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocksize", [32, 64, 4096], ids="b{}".format)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fp4_equals_bitsandbytes(dtype, blocksize, kind, column):
    inputs = [weights(n, kind, dtype, blocksize) for n in (1, blocksize - 1, blocksize, 37 * blocksize + 17)]
    for w in only_supported(_quantize_4bit, column, inputs, blocksize, "fp4"):
        n = len(w)
        for double_quant in (False, True):
            with use_backend(column):
                packed, state = quantize_4bit(w, blocksize, double_quant, "fp4")
                back = dequantize_4bit(packed, state, torch.float32)
            bnb_packed, bnb_state = bnb_quantize(w, blocksize, double_quant, "fp4")
            assert_same(packed, bnb_packed, f"n={n}: packed")
            assert_same(state.absmax, bnb_state.absmax, f"n={n}: absmax")
            theirs = bnb_dequantize(bnb_packed, bnb_state, torch.float32)
            back, theirs = back + 0.0, theirs + 0.0  # 8 is -0 to it in even lengths and 0 in odd ones
            assert_same(back, theirs, f"n={n}: dequantized")


@needs_triton
@pytest.mark.parametrize("quant_type", ["fp4", "int4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096], ids="b{}".format)
@pytest.mark.parametrize("kind", ["normal", "nan"])
def test_the_triton_kernels_are_the_reference(quant_type, blocksize, kind):
    for dtype in (torch.float32, torch.float16):
        for n in (1, 4129, 16384 + 37):
            on_both(weights(n, kind, dtype, blocksize), blocksize, n == 4129, quant_type)


@needs_triton
@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("absmax", [1.0, 0.0123, 7e-39], ids="absmax{}".format)
def test_codes_at_the_decision_bounds(quant_type, absmax):
    bounds = torch.cat([decision_bounds(quant_type)[0], levels(quant_type), torch.tensor([0.0, -0.0])]) * absmax
    near = [bounds.nextafter(torch.tensor(towards)) for towards in (-torch.inf, torch.inf)]
    values = torch.cat([bounds, *near]).clamp(-absmax, absmax)
    w = torch.full((len(values), 32), absmax)  # each value in a block whose absmax is known
    w[:, 5] = values
    packed, _, _ = on_both(w, 32, False, quant_type)
    if quant_type in BITSANDBYTES_TYPES:
        assert_same(packed, bnb_quantize(w, 32, False, quant_type)[0], "packed")


# ------------------------------------------------------------------------------------------- INT4


def test_int4_is_absmax_scaling_rounded_to_integers():
    w = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    packed, state = quantize_4bit(torch.from_numpy(w), 64, quant_type="int4")
    absmax = np.abs(w).max(axis=1, keepdims=True)
    integers = np.rint(7 * w.astype(np.float64) / absmax)
    assert (unpacked(packed).numpy().reshape(w.shape).astype(int) - 8 == integers).all()
    np.testing.assert_allclose(dequantize_4bit(packed, state).numpy(), integers * absmax / 7, rtol=2e-7)


# -------------------------------------------------------------------------------------- any table


@needs_triton
def test_a_new_data_type_is_one_table(monkeypatch):
    """The textbook's: 0.2121 falls on the tenth of sixteen evenly spaced levels from -1 to 1, which is 0.2."""
    shuffled = torch.tensor(EVENLY_SPACED)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    monkeypatch.setitem(CODEBOOKS, "even", EVENLY_SPACED)
    monkeypatch.setitem(CODEBOOKS, "shuffled", tuple(shuffled.tolist()))
    try:
        w = torch.ones(64)
        w[0] = 0.2121
        packed, _, back = on_both(w, 64, False, "even")
        assert unpacked(packed)[0] == 9 and back[0] == pytest.approx(0.2)
        w = weights(4096)
        _, _, even = on_both(w, 64, False, "even")
        _, _, same = on_both(w, 64, False, "shuffled")  # which takes the search, as it does not ascend
        assert torch.equal(even, same)
        assert code_table("even")[2] and not code_table("shuffled")[2]
    finally:
        for cached in (codebook.levels, codebook.decision_bounds, codebook.code_table, codebook.level_pairs):
            cached.cache_clear()


def test_tables_do_not_depend_on_the_default_device():
    """A model is often made under `torch.device("meta")` or "cuda"."""
    tables = (codebook.bin_table, codebook.code_table, codebook.decision_bounds, codebook.level_pairs)
    dynamic = (codebook.dynamic_bins, codebook.dynamic_bounds, codebook.dynamic_codes, codebook.dynamic_map)
    for table in (codebook.levels, *tables, *dynamic):
        table.cache_clear()
    with torch.device("meta"):
        made = [part for table in tables for part in table("fp4")] + [table("cpu") for table in dynamic]
    assert all(tensor.device.type == "cpu" for tensor in made if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("quant_type", CODEBOOKS)
def test_every_level_comes_back_as_itself(quant_type):
    w = levels(quant_type).clamp(-1, 1).repeat(4)
    packed, state = quantize_4bit(w, 64, quant_type=quant_type)
    assert torch.equal(dequantize_4bit(packed, state), w)
    assert levels(quant_type).abs().max() >= 1 and (levels(quant_type) == 0).any()


def test_the_state_says_which_data_type():
    packed, state = quantize_4bit(weights(64), quant_type="fp4")
    as_nf4 = QuantState(state.absmax, state.shape, state.dtype, state.blocksize)
    assert as_nf4.quant_type == "nf4"
    assert not torch.equal(dequantize_4bit(packed, state), dequantize_4bit(packed, as_nf4))


@pytest.mark.parametrize("quant_type", ["fp4", "int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("tokens, columns", [(5, 96), (70, 50)], ids=["few tokens", "many tokens, odd columns"])
def test_linears_multiply_with_any_data_type(backend, quant_type, tokens, columns):
    """As with the dense weight that the codes stand for: the same kernels with another table."""
    device = torch.get_default_device()
    blocksize = 16 if quant_type == "nvfp4" else 32
    w = weights(48 * columns).view(48, columns).to(device)
    packed, state = quantize_4bit(w, blocksize, True, quant_type)
    w = dequantize_4bit(packed, state)
    generator = torch.Generator().manual_seed(1)
    x, lora_A, lora_B, magnitude = (
        torch.randn(*shape, generator=generator, device="cpu").to(device)
        for shape in ((tokens, columns), (4, columns), (48, 4), (48,))
    )
    norm_sq = [weight_norm_sq(packed, state), weight_norm_sq(w)]
    torch.testing.assert_close(*norm_sq, rtol=1e-5, atol=0)
    torch.testing.assert_close(nf4_linear(x, packed, state), x @ w.t(), rtol=1e-4, atol=1e-4)
    results = []
    for base, sq, how in ((packed, norm_sq[0], {"quant_state": state}), (w, norm_sq[1], {})):
        leaves = [t.clone().requires_grad_() for t in (x, lora_A, lora_B, magnitude)]
        y = lora_linear(leaves[0], base, leaves[1], leaves[2], 0.5, **how)
        z = dora_linear(leaves[0], base, sq, leaves[1], leaves[2], leaves[3], 0.5, **how)
        (y.square().sum() + z.square().sum()).backward()
        norm = dora_norm(base, sq, lora_A, lora_B, 0.5, **how)
        results.append([y, z, norm, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


# ---------------------------------------------------------------------------------- k-bit NormalFloat


def test_the_recipe_gives_the_published_levels():
    """All sixteen digits that QLoRA's appendix E prints."""
    assert normal_float(4).tolist() == list(NF4_LEVELS)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_normal_float_has_its_levels(bits):
    found = normal_float(bits)
    assert found.shape == (2**bits,) and (found.diff() > 0).all()
    assert (found < 0).sum() == 2 ** (bits - 1) - 1 and (found == 0).sum() == 1
    assert found[0] == -1 and found[-1] == 1
    outermost = 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    quantiles = norm.ppf(np.linspace(0.5, outermost, 2 ** (bits - 1) + 1))
    np.testing.assert_allclose(found[2 ** (bits - 1) - 1 :].numpy(), quantiles / quantiles[-1], atol=2e-6)


@pytest.mark.parametrize("bits", [1, 9])
def test_a_normal_float_of_other_widths_is_refused(bits):
    with pytest.raises(ValueError, match=f"a NormalFloat of {bits} bits: choose 2 to 8"):
        normal_float(bits)
