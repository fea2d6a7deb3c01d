"""Dequantize on a CPU, by bitsandbytes' routine and by a kernel where that cannot be used: the reference's bits."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from kernels import QuantState, Weight, cpu, dequantize_4bit, quantize_4bit, use_backend
from kernels.codebook import BLOCKSIZES, default_blocksize
from kernels.cpu import nf4 as cpu_nf4
from kernels.nf4 import _dequantize_4bit
from kernels.reference import nf4 as reference

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels cannot run here")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def fresh():
    """Nothing is known about the library, before and after."""
    for remembered in (functions := (cpu_nf4._symbol, cpu_nf4._routine)):
        remembered.cache_clear()
    yield
    for remembered in functions:
        remembered.cache_clear()


def packed(n: int, blocksize: int, double_quant: bool) -> Weight:
    w = torch.randn(n, generator=torch.Generator().manual_seed(n)) * torch.linspace(1e-4, 100, n)
    w[: n // 7] = 0.0
    return Weight(*quantize_4bit(w, blocksize, double_quant))


@pytest.mark.parametrize("double_quant", [False, True], ids=["", "double"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_has_the_bits_of_the_reference(dtype, double_quant):
    pytest.importorskip("bitsandbytes")
    assert cpu_nf4._routine(dtype) is not None
    for blocksize in BLOCKSIZES:
        for n in (1, blocksize - 1, blocksize, 3 * blocksize, 16 * blocksize + 7, 33 * blocksize + blocksize // 2):
            weight = packed(n, blocksize, double_quant)
            assert _dequantize_4bit.column(weight, dtype) == ("reference" if n % blocksize else "cpu")
            got, want = dequantize_4bit(weight, dtype=dtype), reference.dequantize_4bit(weight, dtype)
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (blocksize, n)


def test_infinities_and_nan_stay():
    codes = torch.full((96,), 0x0F, dtype=torch.uint8)  # levels -1 and 1
    state = QuantState(torch.tensor([torch.inf, torch.nan, 2.0]), torch.Size([3, 64]), torch.bfloat16, 64)
    with use_backend("cpu"):
        assert _dequantize_4bit.column(Weight(codes, state), torch.bfloat16) == "cpu"
        w = dequantize_4bit(codes, state)
    assert w[0].isinf().all() and w[1].isnan().all() and (w[2].abs() == 2).all()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("why", ["absent", "without the symbols", "no library", "wrong"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_kernel_computes_where_the_routine_cannot(dtype, why, monkeypatch, tmp_path):
    weight = packed(1024, 64, True)
    if why == "wrong":
        monkeypatch.setattr(cpu_nf4, "_symbol", lambda *_: lambda *pointers_and_sizes: None)
    else:
        spec = importlib.util.spec_from_loader("bitsandbytes", None, is_package=True)
        spec.submodule_search_locations[:] = [str(tmp_path)]
        library = tmp_path / "libbitsandbytes_cpu.so"
        if why == "no library":
            library.write_bytes(b"for another machine")
        elif why == "without the symbols":
            library.symlink_to(torch._C.__file__)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if why == "absent" else spec)
    assert cpu_nf4._routine(dtype) is None
    assert _dequantize_4bit.column(weight, dtype) == ("reference" if dtype == torch.float16 else "cpu")
    want = reference.dequantize_4bit(weight, dtype)
    assert torch.equal(dequantize_4bit(weight, dtype=dtype), want)
    assert torch.equal(cpu_nf4.dense(weight, dtype), want)


@pytest.mark.usefixtures("number_of_threads")
@pytest.mark.parametrize("quant_type", ["int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_data_types(dtype, quant_type):
    blocksize = default_blocksize(quant_type)
    for blocks in (1, 7, 300):
        w = torch.randn(blocks * blocksize) * torch.linspace(1e-4, 100, blocks * blocksize)
        weight = Weight(*quantize_4bit(w, double_quant=True, quant_type=quant_type))
        assert _dequantize_4bit.column(weight, dtype) == "cpu"
        got, want = dequantize_4bit(weight, dtype=dtype), reference.dequantize_4bit(weight, dtype)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_the_package_is_not_imported():
    code = (
        "import sys, torch, kernels\n"
        "kernels.dequantize_4bit(*kernels.quantize_4bit(torch.randn(64)))\n"
        "assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
