"""Compile every kernel for every GPU, without a GPU, and hold its machine code to its budget.

    python -m kernels.aot [--csv FILE] [--targets sm_80,sm_90] [pattern …]

A pattern selects by kernel ("nf4_dequantize") or by kernel and configuration ("nf4_dequantize/b64-*"). The
configurations and budgets are the `AOT_SPECS` of the kernel files; `machine_code` says how instructions are counted.
Exits with 1, naming kernel, configuration and target, if one does not compile, spills registers, needs more shared
memory than the GPU has, or is over its budget. Instruction and register budgets are for NVIDIA GPUs; of AMD code
registers, spills and shared memory (LDS) are checked against the hardware and the rest is reported only.
"""

import argparse
import csv
import fnmatch
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import machine_code
from kernels.dispatch import interpreting
from kernels.spec import KernelSpec

SPEC_MODULES = (
    "kernels.double_quant",
    "kernels.nf4",
    "kernels.nf4_quantize",
    "kernels.row_norm",
    "kernels.gemm",
    "kernels.low_rank",
    "kernels.dora_backward",
    "kernels.nf4_gemm",
    "kernels.dropout",
)


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory a block may have
    bf16: bool = True


_KIB = 1024
TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64 * _KIB, bf16=False),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * _KIB),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * _KIB),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * _KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * _KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * _KIB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * _KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * _KIB),
}


@dataclass(frozen=True)
class Row:
    """What one configuration compiled to on one target: a line of the table and of the CSV file."""

    kernel: str
    config: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instr_per_weight: float  # a value of the kernel, a weight for most
    bytes_per_weight: float
    launches: int
    load_bits: int
    store_bits: int
    mma: bool


def all_specs() -> list[KernelSpec]:
    return [spec for name in SPEC_MODULES for spec in importlib.import_module(name).AOT_SPECS]


def select(specs: Iterable[KernelSpec], patterns: list[str]) -> list[KernelSpec]:
    """Specs that match any pattern, all without a pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """
    specs = list(specs)
    chosen = []
    for pattern in patterns or ["*"]:
        found = [s for s in specs if s.kernel == pattern or fnmatch.fnmatch(f"{s.kernel}/{s.config}", pattern)]
        if not found:
            kernels = ", ".join(sorted({s.kernel for s in specs}))
            raise ValueError(f"no kernel matches {pattern!r}; there are {kernels}")
        chosen += [s for s in found if s not in chosen]
    return chosen


def compile_spec(spec: KernelSpec, target_name: str) -> Row:
    """Compile one configuration for one target and read its machine code."""
    target = TARGETS[target_name]
    signature = {name: spec.signature.get(name, "constexpr") for name in spec.fn.arg_names}
    divisible = [name for name, kind in signature.items() if kind.startswith("*") or name in spec.divisible]
    source = ASTSource(
        spec.fn,
        signature,
        constexprs=dict(spec.constexprs),
        attrs={(spec.fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": spec.fp_fusion,
    }
    kernel = triton.compile(source, target=target.gpu, options=options)
    read = _read_nvidia if target.gpu.backend == "cuda" else _read_amd
    code, registers, spill_bytes = read(kernel)
    load_bits, store_bits = machine_code.access_bits(code)
    per_thread = spec.values / (target.gpu.warp_size * spec.num_warps)
    return Row(
        spec.kernel,
        spec.config,
        target_name,
        registers,
        spill_bytes,
        kernel.metadata.shared,
        round(machine_code.count_path(code, spec.loop) / per_thread, 2),
        round(spec.bytes_per_value, 3),
        spec.launches,
        load_bits,
        store_bits,
        machine_code.uses_mma(code),
    )


def _read_nvidia(kernel) -> tuple[list[machine_code.Instruction], int, int]:
    """(instructions, registers, spilled bytes) from a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = machine_code.parse_sass(listing)
    return code, int(re.search(r"REG:(\d+)", listing)[1]), machine_code.spilled_bytes(code)


def _read_amd(kernel) -> tuple[list[machine_code.Instruction], int, int]:
    """(instructions, vector registers, spilled bytes) from AMD assembly."""
    text = kernel.asm["amdgcn"]
    code = machine_code.parse_amd(text)
    return (
        code,
        int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
    )


def violations(spec: KernelSpec, row: Row) -> list[str]:
    """What of `row` is over the budget of `spec` or beyond the hardware."""
    target = TARGETS[row.target]
    found = []
    if row.spill_bytes:
        found.append(f"spills {row.spill_bytes} bytes")
    if row.shared_bytes > target.shared_limit:
        found.append(f"needs {row.shared_bytes} bytes of shared memory, the GPU has {target.shared_limit}")
    if target.gpu.backend != "cuda":
        return found
    max_instr = spec.max_instr_on.get(row.target, spec.max_instr)
    if max_instr is not None and row.instr_per_weight > max_instr:
        found.append(f"{row.instr_per_weight} instructions a weight, budget {max_instr}")
    if row.registers > spec.max_registers:
        found.append(f"{row.registers} registers, budget {spec.max_registers}")
    if row.load_bits < spec.min_load_bits:
        found.append(f"{row.load_bits}-bit loads, budget {spec.min_load_bits}")
    if row.store_bits < spec.min_store_bits:
        found.append(f"{row.store_bits}-bit stores, budget {spec.min_store_bits}")
    if spec.mma and not row.mma:
        found.append("does not use the matrix units")
    return found


_LINE = "{:<18} {:<26} {:<7} {:>9} {:>6} {:>7} {:>8} {:>8} {:>5} {:>6} {:>4}  {}"
_HEAD = ("kernel", "config", "target", "registers", "spill", "shared", "instr/w", "bytes/w", "load", "store", "mma", "")


def run(specs: list[KernelSpec], targets: list[str], csv_file: str | None = None) -> int:
    """Compile `specs` for `targets`, print a table, write a CSV file; the exit status: 1 if any is over budget."""
    rows, failures = [], []
    print(_LINE.format(*_HEAD))
    for spec in specs:
        for target in targets:
            if spec.uses_bf16 and not TARGETS[target].bf16:
                continue
            name = f"{spec.kernel}/{spec.config} on {target}"
            try:
                row = compile_spec(spec, target)
            except Exception as error:  # whatever the compiler throws, the other configurations still count
                failures.append(f"{name}: does not compile: {type(error).__name__}: {error}")
                continue
            rows.append(row)
            over = violations(spec, row)
            failures += [f"{name}: {what}" for what in over]
            cells = [row.registers, row.spill_bytes, row.shared_bytes, row.instr_per_weight, row.bytes_per_weight]
            cells += [row.load_bits, row.store_bits, "yes" if row.mma else "-", "OVER BUDGET" if over else ""]
            print(_LINE.format(row.kernel, row.config, row.target, *cells), flush=True)
    if csv_file:
        with open(csv_file, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    print(f"{len(rows)} compiled, {len(failures)} over budget or not compiled; bf16 is left out on sm_75")
    for failure in failures:
        print(f"OVER BUDGET {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("pattern", nargs="*", help="kernel, or kernel/config with wildcards (default: all)")
    parser.add_argument("--csv", metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    options = parser.parse_args(argv)
    targets = options.targets.split(",")
    if unknown := [name for name in targets if name not in TARGETS]:
        parser.error(f"unknown target {', '.join(unknown)}; choose from {', '.join(TARGETS)}")
    try:
        specs = select(all_specs(), options.pattern)
    except ValueError as error:
        parser.error(str(error))
    if interpreting():
        print("TRITON_INTERPRET=1 leaves nothing to compile: starting again without it", file=sys.stderr, flush=True)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "kernels.aot", *argv], environment)
    return run(specs, targets, options.csv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
