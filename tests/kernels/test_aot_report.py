"""The report on compiled kernels: roofline, table, picture, bitsandbytes' kernels counted by the same rule."""

import dataclasses
import subprocess
from pathlib import Path

import bitsandbytes
import pytest
import triton

from kernels.aot import cubin, machine_code, peers
from kernels.aot.compiler import Row
from kernels.aot.plot import plot
from kernels.aot.report import table
from kernels.aot.roofline import GPUS
from kernels.aot.targets import TARGETS
from kernels.triton import nf4

CASE = next(case for case in nf4.CASES if case.config == "b64-double-bf16")
ROW = Row("nf4_dequantize", CASE.config, "sm_90", 40, 0, 2048, 6.1406, 2.51569, 1, 128, 128, False)


def test_break_even_is_where_issuing_takes_as_long_as_memory():
    lower, upper = GPUS["sm_90"].break_even(2.516)
    assert lower == pytest.approx(132 * 64 * 1.98e9 * 2.516 / 3.35e12) == pytest.approx(12.56, abs=0.01)
    assert upper == pytest.approx(2 * lower)


@pytest.mark.parametrize(
    ("instr", "flops", "what", "picoseconds"),
    [(12, 0, "memory", 0.751), (13, 0, "mix", 0.751), (50, 0, "issue", 1.495), (12, 2000, "mma", 2.022)],
)
def test_bounds(instr, flops, what, picoseconds):
    seconds, bound = GPUS["sm_90"].bound(instr, 2.516, flops)
    assert bound == what and seconds * 1e12 == pytest.approx(picoseconds, abs=0.001)


def test_the_table_fits_a_terminal_and_marks_what_is_over_budget():
    worst = dataclasses.replace(
        ROW, config="bitsandbytes-triton-b64-bf16", registers=255, spill_bytes=4096, shared_bytes=227 * 1024, mma=True
    )
    case = dataclasses.replace(CASE, flops_per_value=2000.0)
    lines = table(
        [(CASE, ROW), (case, worst), (case, dataclasses.replace(worst, target="gfx942"))], {worst}
    ).splitlines()
    assert max(map(len, lines)) <= 140
    assert [line for line in lines if line.startswith("!")] == [lines[-2]]
    assert "b64-double-bf16" in lines[4] and "H100 0.751 ps, memory" in lines[4]
    assert "227.0/227" in lines[-2] and "H100 2.02 ps, mma" in lines[-2]
    assert "b64" not in lines[-1]  # the configuration is named once


def test_picture(tmp_path):
    plot(tmp_path / "sub" / "static.png", [(CASE, ROW), (CASE, dataclasses.replace(ROW, target="sm_100"))])
    assert (tmp_path / "sub" / "static.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot(tmp_path / "none.png", [(CASE, dataclasses.replace(ROW, kernel="gemm"))])


@pytest.fixture(scope="module")
def library() -> Path:
    found = sorted(Path(bitsandbytes.__file__).parent.glob("libbitsandbytes_cuda*.so"))
    if not found:
        pytest.skip("bitsandbytes is installed without its CUDA library")
    return found[-1]


def test_bitsandbytes_cuda_kernels_cost_more(library):
    rows = {row.kernel: row for _, row in peers._from_library(library, "sm_80")}
    assert rows["nf4_dequantize"].instr_per_weight > 2 * 6.5 and rows["nf4_quantize"].instr_per_weight > 2 * 18
    assert rows["adamw8bit"].instr_per_weight > 2 * 119
    assert rows["nf4_dequantize"].launches == 3 and rows["nf4_dequantize"].store_bits == 16


def test_kernels_disassembled_together_are_counted_as_each_alone(library, tmp_path):
    image = cubin.extract(library, "sm_90")
    (tmp_path / "sm_90.cubin").write_bytes(image)
    texts = [cubin.text_section(image, peer.symbol) for peer in peers._CUDA]
    for peer, listing in zip(peers._CUDA, cubin.disassemble(texts, TARGETS["sm_90"].gpu.arch)):
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-fun", peer.symbol, str(tmp_path / "sm_90.cubin")]
        alone = machine_code.parse_sass(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        together = machine_code.parse_sass(listing)
        assert [i.opcode for i in together] == [i.opcode for i in alone]
        assert machine_code.count_path(together, loop=False) == machine_code.count_path(alone, loop=False)


def test_what_is_not_there_is_named(library):
    with pytest.raises(FileNotFoundError, match="has no code for sm_13"):
        cubin.extract(library, "sm_13")
    with pytest.raises(ValueError, match="no kernel absent in the cubin"):
        cubin.text_section(cubin.extract(library, "sm_80"), "absent")
