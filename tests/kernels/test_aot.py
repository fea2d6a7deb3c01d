"""Compiling without a GPU: counts are right on hand-written listings, a case is compiled as its launcher launches it,
real kernels keep their budgets, and a broken budget is reported by name."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.aot.__main__ import all_cases, main
from kernels.aot.machine_code import access_bits, count_path, parse_amd, parse_sass, spilled_bytes, uses_mma
from kernels.triton import adamw, gemm, nf4
from kernels.triton.case import Case, meta

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
            "@P0 BRA 0x20 &req={0} ?trans6",  # as ptxas writes for sm_120
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
        code="import dataclasses, sys; from kernels.triton import absmax; from kernels.aot.__main__ import run;"
        "from kernels.triton.launch import launch;"
        "case = absmax.CASES[1];"
        "over = dataclasses.replace(case, max_instr=1.0, max_registers=2, min_store_bits=256);"
        "call = lambda: launch(case.fn, (1,), *range(6), fp_fusion=False);"  # integers for pointers
        "broken = dataclasses.replace(case, config='broken', call=call);"
        "sys.exit(run([over, broken], ['sm_80']))"
    )
    assert done.returncode == 1
    for what in ("instructions a weight, budget 1.0", "registers, budget 2", "-bit stores, budget 256"):
        assert what in done.stderr
    assert done.stderr.count("OVER BUDGET absmax_dequantize/b256 on sm_80: ") == 3
    assert "DOES NOT COMPILE absmax_dequantize/broken on sm_80: " in done.stderr


def test_every_launch_of_nf4_is_compiled():
    cases = all_cases()
    configs = {kernel: {case.config for case in cases if case.kernel == kernel} for kernel in {c.kernel for c in cases}}
    assert configs["nf4_dequantize"] == {
        f"b{2**i}-{double}{dtype}"
        for i in range(5, 13)
        for double in ("", "double-")
        for dtype in ("bf16", "fp16", "fp32")
    } | {f"b16-double-{dtype}-nvfp4" for dtype in ("bf16", "fp16", "fp32")}
    assert configs["nf4_quantize"] == {
        *(f"b{2**i}-{dtype}" for i in range(5, 13) for dtype in ("bf16", "fp16", "fp32")),
        *(f"search-b{blocksize}-{dtype}" for blocksize in (64, 4096) for dtype in ("bf16", "fp16", "fp32")),
        *(f"scales-b{blocksize}-{dtype}" for blocksize in (16, 32) for dtype in ("bf16", "fp32")),
    }
    assert len({(case.kernel, case.config) for case in cases}) == len(cases)


# ------------------------------------------------------------------------- cases and their launches


def case_of(module, config: str) -> Case:
    """A case that has not been asked for its launch."""
    return dataclasses.replace(next(case for case in module.CASES if case.config == config))


def test_every_case_has_one_launch_and_a_count():
    for case in all_cases():
        assert case.launch.kernel is case.fn and case.launch.grid
        assert case.count(case.values) > 0 and case.bytes_per_value > 0
        assert set(case.launch.options) <= {"num_warps", "num_stages", "enable_fp_fusion"}


def test_a_change_of_a_launcher_is_a_change_of_its_cases(monkeypatch):
    before, real = case_of(gemm, "forward-r64-bf16"), gemm._tiles
    assert before.launch.options["num_warps"] == 8
    monkeypatch.setattr(gemm, "_tiles", lambda *args: real(*args) | {"BLOCK_K": 32, "num_warps": 4})
    after = case_of(gemm, "forward-r64-bf16")
    assert before.count(before.values) == 2 * after.count(after.values) == 128 * 128 * 64
    assert after.launch.options["num_warps"] == 4
    numbers = {name for name, value in before.launch.arguments.items() if isinstance(value, int | float)}
    changed = {name for name in numbers if after.launch.arguments[name] != before.launch.arguments[name]}
    assert changed == {"BLOCK_K"}


def test_a_case_that_launches_its_kernel_twice_or_never_is_refused():
    case = case_of(nf4, "b64-double-bf16")

    def twice():
        nf4.CASES[0].call()
        nf4.CASES[1].call()

    for call, times in ((twice, 2), (lambda: None, 0)):
        wrong = dataclasses.replace(case, call=call)
        with pytest.raises(ValueError, match=rf"nf4_dequantize/b64-double-bf16: .* _dequantize_kernel {times} times"):
            wrong.launch  # noqa: B018


def test_an_unaligned_tensor_without_memory_is_unaligned():
    aligned, unaligned = (case_of(adamw, config).launch.arguments for config in ("fp32", "fp32-unaligned"))
    assert aligned["ALIGNED"] and not unaligned["ALIGNED"]
    assert meta(5)[1:].data_ptr() % 16 == 4


def test_what_is_compiled_is_what_would_be_launched():
    """Triton compiles from within `kernel[grid](...)` what `source_of` gives: with a driver that only names its GPU."""
    done = run_aot(
        code="""
import triton
from kernels.aot.__main__ import all_cases
from kernels.aot.compiler import source_of
from kernels.aot.targets import TARGETS

class Driver:
    def get_current_target(self): return TARGETS["sm_90"].gpu
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

compiled = []

class Compiled:
    def __init__(self, source, target, options): compiled.append((source.hash(), target, options))
    def __getattr__(self, name): return lambda *args: None

triton.runtime.driver.set_active(Driver())
for case in all_cases():
    launch = case.launch
    _, _, target, backend, binder = launch.kernel.create_binder()
    launch.kernel.compile = Compiled
    launch.kernel.device_caches[0] = ({}, {}, target, backend, binder)
    launch.kernel[launch.grid](**launch.arguments, **launch.options)
    source, options = source_of(launch, "sm_90")
    [(found, on, given)] = compiled
    assert (found, on) == (source.hash(), target), case
    differing = {name for name in options if options[name] != given[name]}
    assert not differing, (case.kernel, case.config, differing)
    compiled.clear()
print(len(all_cases()))
"""
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(all_cases())


def test_for_few_tokens_what_is_read_has_one_dimension_of_threads():
    """Of several, Triton 3.6 gives a warp's lanes to another one than 3.7 does, and reads do not coalesce."""
    done = run_aot(
        code="""
import re
from kernels.aot.__main__ import all_cases
from kernels.aot.compiler import _compile_one
for name in ("nf4_gemv/m2-n4096-double-bf16", "nf4_gemm/m16-b16-double-bf16-nvfp4"):
    [case] = [case for case in all_cases() if f"{case.kernel}/{case.config}" == name]
    shapes = re.findall(r"= tt.load .*tensor<([0-9x]+)!tt.ptr", _compile_one(case, "sm_90").asm["ttgir"])
    ranks = [shape.count("x") for shape in shapes]
    print(len(ranks), max(ranks))
"""
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        count, most = map(int, line.split())
        assert count >= 3 and most <= 2, done.stdout  # threads, and the consecutive words of one


# ----------------------------------------------------------------------------------------- the cache


def test_only_what_has_changed_is_compiled_again(tmp_path):
    done = run_aot(
        code="import dataclasses; from kernels.triton import absmax; from kernels.aot import compiler; done = [];"
        "real = compiler._compile_one;"
        "compiler._compile_one = lambda case, target: done.append(case.config) or real(case, target);"
        "cases = [dataclasses.replace(case, config=case.kernel) for case in absmax.CASES];"
        "rows = compiler.compile_all(cases, 'sm_80', 1);"
        "assert compiler.compile_all(cases, 'sm_80', 1) == rows;"
        "absmax.NUM_WARPS = 2;"  # the launcher changes
        "cases = [cases[0], dataclasses.replace(cases[1], config='changed')];"
        "rows = compiler.compile_all(cases, 'sm_80', 1);"
        "[file.write_text('{') for file in compiler.cache_dir().iterdir()];"  # as if the disk had been full
        "assert compiler.compile_all(cases, 'sm_80', 1) == rows;"
        "print(*done)",
        QDORA_CACHE=str(tmp_path),
    )
    first = ["absmax_quantize", "absmax_dequantize"]
    assert done.stdout.split() == [*first, "changed", "absmax_quantize", "changed"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "sm_13"], "unknown target sm_13"),
        (["--jobs", "0"], "at least 1"),
    ],
    ids=["target", "jobs"],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_unknown_kernel_is_refused(capsys):
    assert main(["no_such_kernel"]) == 1
    assert capsys.readouterr().err.startswith("error: no kernel matches 'no_such_kernel'; there are ")
