"""Blockwise data types of two to eight bits against numpy in float64 and the kernels' own bytes; storage to the bit."""

import math

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from experiments.blocks.quant_types import (
    Errors,
    check_quant_type,
    code_bits,
    constant_bits_per_weight,
    quantize_dequantize,
    stored_bits,
)
from kernels import quantize_4bit
from kernels.codebook import normal_float
from tests.experiments.helpers import nearest


def weights(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator) * 1.7 ** (torch.arange(n) // 64 % 7 - 3)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("n", [1, 63, 64, 1000])
def test_a_normal_float_gives_the_nearest_level(bits, n):
    w = weights(n)
    expected = nearest(w.double().numpy(), normal_float(bits).double().numpy(), 64)
    np.testing.assert_allclose(quantize_dequantize(w, f"nf{bits}", 64, False).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_are_bitsandbytes(quant_type, double):
    w = weights(64 * 300).view(150, 128)
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type=quant_type)
    assert torch.equal(quantize_dequantize(w, quant_type, 64, double), bnb.dequantize_4bit(packed, state))


def test_the_recipe_at_four_bits_is_nf4():
    w = weights(6400)
    as_recipe = nearest(w.double().numpy(), normal_float(4).double().numpy(), 64)
    np.testing.assert_allclose(quantize_dequantize(w, "nf4", 64, False).numpy(), as_recipe, rtol=1e-6)


def test_double_quantization_changes_absmax_as_in_four_bits():
    w = weights(64 * 700)
    scales = [quantize_dequantize(w, t, 64, True) / quantize_dequantize(w, t, 64, False) for t in ("nf3", "nf4")]
    of_blocks = [scale.view(-1, 64).nan_to_num(nan=-1.0).amax(dim=1) for scale in scales]
    assert (of_blocks[0] != 1).any()
    torch.testing.assert_close(of_blocks[0], of_blocks[1], rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_shapes_stay():
    for quant_type in ("nf2", "nf8", "int4"):
        assert torch.equal(quantize_dequantize(torch.zeros(3, 50), quant_type, 32, True), torch.zeros(3, 50))


@pytest.mark.parametrize("n", [64 * 256 * 3, 1000, 1])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("double", [False, True])
def test_storage_is_what_is_stored(n, blocksize, double):
    packed, state = quantize_4bit(torch.ones(n), blocksize, double)
    stored = sum(tensor.nbytes for tensor in (packed, *state.tensors()) if tensor is not None)
    assert stored_bits(n, "nf4", blocksize, double) == 8 * stored
    assert stored_bits(n, "nf3", blocksize, double) == 8 * (stored - packed.nbytes + math.ceil(3 * n / 8))


def test_storage_to_the_bit():
    n = 64 * 256 * 1000
    assert stored_bits(n, "nf4", 64, False) == 4 * n + n // 2
    assert stored_bits(n, "int4", 64, True) == 4 * n + 8 * n // 64 + 32 * n // (64 * 256) + 32  # the last: the mean
    assert constant_bits_per_weight(64, False) == 0.5
    assert constant_bits_per_weight(64, True) == 8 / 64 + 32 / (64 * 256) == 0.126953125
    assert [code_bits(quant_type) for quant_type in ("nf2", "nf3", "nf4", "fp4", "int4", "nf8")] == [2, 3, 4, 4, 4, 8]


def test_errors_are_numpys():
    errors, parts = Errors(), [(weights(n), quantize_dequantize(weights(n), "nf3", 64, False)) for n in (700, 64)]
    for w, quantized in parts:
        errors.add(w, quantized)
    w, quantized = (np.concatenate([pair[i].double().numpy() for pair in parts]) for i in (0, 1))
    error = np.linalg.norm(quantized - w) / np.linalg.norm(w)
    assert errors.rms_relative == pytest.approx(error, rel=1e-12)
    assert errors.max_relative == pytest.approx(np.abs(quantized - w).max() / np.sqrt((w**2).mean()), rel=1e-12)
    assert errors.sqnr_db == pytest.approx(10 * np.log10((w**2).sum() / ((quantized - w) ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("quant_type", ["nf1", "nf9", "nf44", "int8", "NF4", ""])
def test_other_data_types_are_refused(quant_type):
    with pytest.raises(ValueError, match=f"'{quant_type}' is not one of nf4, fp4, int4, mxfp4, nvfp4 or nfK"):
        check_quant_type(quant_type)


def test_other_block_sizes_are_refused():
    for quant_type in ("nf4", "nf3"):
        with pytest.raises(ValueError, match="blocksize 48 is not one of 32, 64"):
            quantize_dequantize(weights(64), quant_type, 48, False)
