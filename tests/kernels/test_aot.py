"""Compiling without a GPU: the counts are right on hand-written listings, real kernels keep their budgets, and a
broken budget is reported by name."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import nf4, nf4_quantize
from kernels.aot.__main__ import all_specs, main
from kernels.aot.machine_code import access_bits, count_path, parse_amd, parse_sass, spilled_bytes, uses_mma

ROOT = Path(__file__).parents[2]
SUBSET = ["nf4_dequantize/b64-double-bf16", "nf4_quantize/b64-bf16", "absmax_*"]
COLUMNS = (
    "kernel,config,target,registers,spill_bytes,shared_bytes,instr_per_weight,bytes_per_weight,launches,"
    "load_bits,store_bits,mma"
)


def sass(*lines: str) -> str:
    """A cuobjdump listing: an instruction every 16 bytes."""
    return "".join(f"        /*{16 * i:04x}*/                   {line} ;  /* 0x0 */\n" for i, line in enumerate(lines))


def test_a_rare_branch_is_not_counted():
    code = parse_sass(
        sass(
            "LDG.E.128 R4, [R2.64]",
            "@!P0 BRA 0x40",
            "MOV R1, R2",  # the rare case
            "CALL.REL.NOINC 0x80",
            "@P1 EXIT",  # a predicated exit is not taken
            "STG.E.64 [R2.64], R4",
            "NOP",
            "EXIT",
            "RET.REL.NODEC R2 0x0",
            "BRA 0x90",
        )
    )
    assert count_path(code, loop=False) == 5
    assert access_bits(code) == (128, 64)
    assert not uses_mma(code) and spilled_bytes(code) == 0


def test_a_call_of_the_exit_leaves_a_loop():
    code = parse_sass(
        sass("FADD R0, R0, R0", "STG.E [R2.64], R4", "@P0 CALL.REL.NOINC 0x40", "BRA 0x0", "EXIT", "BRA 0x50")
    )
    assert count_path(code, loop=False) == 4


def test_of_two_paths_the_one_that_stores_is_counted():
    code = parse_sass(
        sass("@P0 BRA 0x40", "FADD R0, R0, R0", "STG.E.128 [R2.64], R4", "EXIT", "STG.E.U8 [R2.64], R4", "EXIT")
    )
    assert count_path(code, loop=False) == 4


def test_the_longest_innermost_loop_is_counted():
    code = parse_sass(
        sass(
            "MOV R1, R2",
            "FADD R0, R0, R0",  # 0x10: outer loop
            "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # 0x20: inner loop
            "@P1 BRA 0x50",
            "STL.64 [R1], R4",
            "IADD3 R0, R0, 0x1, RZ",
            "@P0 BRA 0x20",
            "@P2 BRA 0x10",
            "EXIT",
            "BRA 0x90",
        )
    )
    assert count_path(code, loop=True) == 4
    assert uses_mma(code) and spilled_bytes(code) == 8
    with pytest.raises(ValueError, match="no loop"):
        count_path(code[-2:], loop=True)


def test_amd_assembly():
    code = parse_amd(
        "kernel:\n\ts_load_dwordx2 s[0:1], s[4:5], 0x0\n\tglobal_load_dwordx4 v[0:3], v4, s[0:1]\n"
        "\ts_nop 1\n\ts_cbranch_scc1 .LBB0_2\n; %bb.1:\n\tv_add_f32_e32 v0, v0, v0\n"
        ".LBB0_2:\n\tglobal_store_short v4, v0, s[2:3]\n\tv_mfma_f32_16x16x16_f16 a[0:3], v0, v1, 0\n\ts_endpgm\n"
    )
    assert count_path(code, loop=False) == 6
    assert access_bits(code) == (128, 16)
    assert uses_mma(code)


def run_aot(*arguments: str, code: str | None = None, **variables: str) -> subprocess.CompletedProcess:
    """`python -m kernels.aot …`, or Python code, in a process of its own: this one may run the interpreter."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "kernels.aot", *arguments]
    environment = {name: value for name, value in os.environ.items() if not (code and name == "TRITON_INTERPRET")}
    environment |= variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_default_configurations_keep_their_budgets(tmp_path):
    done = run_aot("--targets", "sm_80,sm_90", "--csv", str(tmp_path / "aot.csv"), *SUBSET)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "aot.csv", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS.split(",")
        rows = {(row["kernel"], row["target"]): row for row in reader}
    assert len(rows) == 8
    for target in ("sm_80", "sm_90"):
        dequantize = rows["nf4_dequantize", target]
        assert float(dequantize["instr_per_weight"]) <= 6.5 and int(dequantize["registers"]) <= 64
        assert (dequantize["load_bits"], dequantize["store_bits"], dequantize["launches"]) == ("128", "128", "1")
        assert float(rows["nf4_quantize", target]["instr_per_weight"]) <= 18
        assert all(row["spill_bytes"] == "0" for row in rows.values())


def test_broken_budgets_and_kernels_that_do_not_compile_fail_with_their_names():
    done = run_aot(
        code="import dataclasses, sys; from kernels import double_quant; from kernels.aot.__main__ import run;"
        "spec = double_quant.AOT_SPECS[1];"
        "over = dataclasses.replace(spec, max_instr=1.0, max_registers=2, min_store_bits=64);"
        "broken = dataclasses.replace(spec, config='broken', signature={'n': 'i64'});"
        "sys.exit(run([over, broken], ['sm_80']))"
    )
    assert done.returncode == 1
    for what in ("instructions a weight, budget 1.0", "registers, budget 2", "-bit stores, budget 64"):
        assert what in done.stderr
    assert done.stderr.count("OVER BUDGET absmax_dequantize/b256 on sm_80: ") == 3
    assert "absmax_dequantize/broken on sm_80: does not compile" in done.stderr


def test_every_launch_of_nf4_is_compiled():
    assert {spec.config for spec in nf4.AOT_SPECS} == {
        f"b{2**i}-{double}{dtype}"
        for i in range(5, 13)
        for double in ("", "double-")
        for dtype in ("bf16", "fp16", "fp32")
    }
    assert {spec.config for spec in nf4_quantize.AOT_SPECS} == {
        *(f"b{2**i}-{dtype}" for i in range(5, 13) for dtype in ("bf16", "fp16", "fp32")),
        *(f"search-b{blocksize}-{dtype}" for blocksize in (64, 4096) for dtype in ("bf16", "fp16", "fp32")),
    }
    specs = all_specs()
    assert len({(spec.kernel, spec.config) for spec in specs}) == len(specs)


def test_only_what_has_changed_is_compiled_again(tmp_path):
    done = run_aot(
        code="import dataclasses; from kernels import double_quant; from kernels.aot import compiler; done = [];"
        "real = compiler._compile_one;"
        "compiler._compile_one = lambda spec, target: done.append(spec.config) or real(spec, target);"
        "specs = [dataclasses.replace(spec, config=spec.kernel) for spec in double_quant.AOT_SPECS];"
        "rows = compiler.compile_all(specs, 'sm_80', 1);"
        "assert compiler.compile_all(specs, 'sm_80', 1) == rows;"
        "specs[1] = dataclasses.replace(specs[1], config='changed', num_warps=2);"
        "rows = compiler.compile_all(specs, 'sm_80', 1);"
        "[file.write_text('{') for file in compiler.cache_dir().iterdir()];"  # as if the disk had been full
        "assert compiler.compile_all(specs, 'sm_80', 1) == rows;"
        "print(*done)",
        QDORA_CACHE=str(tmp_path),
    )
    first = ["absmax_quantize", "absmax_dequantize"]
    assert done.stdout.split() == [*first, "changed", "absmax_quantize", "changed"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_kernel"], "no kernel matches 'no_such_kernel'"),
        (["--targets", "sm_13"], "unknown target sm_13"),
        (["--jobs", "0"], "at least 1"),
    ],
    ids=["kernel", "target", "jobs"],
)
def test_unknown_names_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
