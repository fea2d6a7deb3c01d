"""bitsandbytes' routine behind dequantize: the twin's bits, and the twin where it is missing or differs."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from kernels import cpu_dequantize, quantize_4bit, reference
from kernels.codebook import BLOCKSIZES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def fresh():
    """What was found out about the library is forgotten, before and after."""
    for remembered in (functions := (cpu_dequantize._symbol, cpu_dequantize._routine)):
        remembered.cache_clear()
    yield
    for remembered in functions:
        remembered.cache_clear()


def arguments(n: int, blocksize: int, double_quant: bool, dtype: torch.dtype) -> tuple:
    w = torch.randn(n, generator=torch.Generator().manual_seed(n)) * torch.linspace(1e-4, 100, n)
    w[: n // 7] = 0.0
    packed, state = quantize_4bit(w, blocksize, double_quant)
    return packed, *state.tensors(), blocksize, "nf4", [n], dtype


@pytest.mark.parametrize("double_quant", [False, True], ids=["", "double"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_has_the_bits_of_the_twin(dtype, double_quant):
    pytest.importorskip("bitsandbytes")
    assert cpu_dequantize._routine(dtype) is not None
    for blocksize in BLOCKSIZES:
        for n in (1, blocksize - 1, blocksize, 3 * blocksize, 16 * blocksize + 7, 33 * blocksize + blocksize // 2):
            args = arguments(n, blocksize, double_quant, dtype)
            got, want = cpu_dequantize.dequantize_4bit(*args), reference.dequantize_4bit(*args)
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (blocksize, n)


def test_infinities_and_nan_stay():
    packed = torch.full((96,), 0x0F, dtype=torch.uint8)  # levels -1 and 1
    absmax = torch.tensor([torch.inf, torch.nan, 2.0])
    w = cpu_dequantize.dequantize_4bit(packed, absmax, None, None, 64, "nf4", [3, 64], torch.bfloat16)
    assert w[0].isinf().all() and w[1].isnan().all() and (w[2].abs() == 2).all()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("why", ["absent", "without the symbols", "no library", "wrong"])
def test_the_twin_computes_where_the_routine_cannot(why, monkeypatch, tmp_path):
    args = arguments(1000, 64, True, torch.float32)
    if why == "wrong":
        monkeypatch.setattr(cpu_dequantize, "_symbol", lambda *_: lambda *pointers_and_sizes: None)
    else:
        spec = importlib.util.spec_from_loader("bitsandbytes", None, is_package=True)
        spec.submodule_search_locations[:] = [str(tmp_path)]
        library = tmp_path / "libbitsandbytes_cpu.so"
        if why == "no library":
            library.write_bytes(b"for another machine")
        elif why == "without the symbols":
            library.symlink_to(torch._C.__file__)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if why == "absent" else spec)
    assert cpu_dequantize._routine(torch.float32) is None
    assert torch.equal(cpu_dequantize.dequantize_4bit(*args), reference.dequantize_4bit(*args))


def test_the_package_is_not_imported():
    code = (
        "import sys, torch, kernels\n"
        "kernels.dequantize_4bit(*kernels.quantize_4bit(torch.randn(64)))\n"
        "assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
