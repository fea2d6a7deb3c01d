"""quantized_init: the error it reports is true, falls, and is below that of quantizing alone; bad input."""

import pytest
import torch

from kernels import dequantize_4bit, quantize_4bit
from modules.adapters.decompose import decompose
from modules.adapters.quantized_init import quantized_init


@pytest.fixture
def w():
    """[96, 160], with a few strong directions, as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(96, 6, generator=generator) @ torch.randn(6, 160, generator=generator)
    return 0.02 * (strong + torch.randn(96, 160, generator=generator))


def relative(error, w):
    return (error.double().norm() / w.double().norm()).item()


@pytest.mark.parametrize("start", ["loftq", "pissa"])
@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
@pytest.mark.parametrize("blocksize, double_quant", [(32, True), (64, False)])
def test_the_error_falls_and_is_below_that_of_quantizing_alone(w, start, quant_type, blocksize, double_quant):
    alone = w - dequantize_4bit(*quantize_4bit(w, blocksize, double_quant, quant_type))
    found = quantized_init(w, 8, start, 6, blocksize, double_quant, quant_type)
    q = dequantize_4bit(found.packed, found.quant_state)
    assert found.quant_state.quant_type == quant_type and found.quant_state.nested == double_quant
    assert found.lora_A.shape == (8, 160) and found.lora_B.shape == (96, 8)
    assert relative(w - q - found.lora_B @ found.lora_A, w) == pytest.approx(found.errors[-1], rel=1e-4)
    assert len(found.errors) > 1 and all(after < before for before, after in zip(found.errors, found.errors[1:]))
    assert found.errors[0] < relative(alone, w)
    for other in ("svd", "als"):
        assert quantized_init(w, 8, start, 6, blocksize, double_quant, quant_type, method=other).errors[
            -1
        ] == pytest.approx(found.errors[-1], rel=0.02)


def test_one_iteration_of_loftq_is_plain_quantization_and_the_components_of_what_it_lost(w):
    found = quantized_init(w, 4, "loftq", 1, method="svd")
    packed, state = quantize_4bit(w, 64, True)
    assert torch.equal(found.packed, packed) and torch.equal(found.quant_state.absmax, state.absmax)
    lora_A, lora_B = decompose(w - dequantize_4bit(packed, state), 4)
    torch.testing.assert_close(found.lora_B @ found.lora_A, lora_B @ lora_A)


def test_pissa_quantizes_what_is_left_beside_the_principal_components(w):
    lora_A, lora_B = decompose(w, 6)
    found = quantized_init(w, 6, "pissa", 1, method="svd")
    assert torch.equal(found.packed, quantize_4bit(w - lora_B @ lora_A, 64, True)[0])
    assert found.errors[0] < quantized_init(w, 6, "loftq", 1).errors[0]


def test_other_dtypes_and_weights_of_zeros(w):
    for dtype in (torch.float16, torch.bfloat16):
        found = quantized_init(w.to(dtype), 4)
        assert found.quant_state.dtype == dtype and found.lora_A.dtype == torch.float32
    assert quantized_init(torch.zeros(32, 64), 4).errors == [0.0]


def test_bad_input(w):
    with pytest.raises(ValueError, match="start 'olora' is not one of loftq, pissa"):
        quantized_init(w, 4, "olora")
    with pytest.raises(ValueError, match="iterations=0: choose 1 or more"):
        quantized_init(w, 4, iterations=0)
    with pytest.raises(ValueError, match="rank 97 is out of range"):
        quantized_init(w, 97)
    with pytest.raises(ValueError, match="blocksize 48 is not one of"):
        quantized_init(w, 4, blocksize=48)
