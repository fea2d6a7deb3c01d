"""Compile specs for one target and read what came out. Rows are cached: only what has changed is compiled again."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton
from triton.compiler import ASTSource

from kernels.aot import cubin, machine_code
from kernels.aot.targets import TARGETS
from kernels.spec import KernelSpec


@dataclass(frozen=True)
class Row:
    """What one configuration compiled to on one target: a line of the table and of the CSV file."""

    kernel: str
    config: str
    target: str
    registers: int  # a thread
    spill_bytes: int  # a thread's stack, or what it stores there, whichever is more
    shared_bytes: int  # a block
    instr_per_weight: float  # a value of the kernel, a weight for most
    bytes_per_weight: float
    launches: int
    load_bits: int
    store_bits: int
    mma: bool


def compile_all(specs: Sequence[KernelSpec], target: str, jobs: int) -> list[Row | Exception]:
    """A row for each spec, or what the compiler threw."""
    keys = [_key(spec, target) for spec in specs]
    results: dict[str, Row | Exception] = {key: row for key in keys if (row := _load(key))}
    todo = {key: spec for key, spec in zip(keys, specs) if key not in results}
    results |= zip(todo, _compile(list(todo.values()), target, jobs))
    for key in todo:
        if isinstance(row := results[key], Row):
            _save(key, row)
    return [results[key] for key in keys]


def _compile(specs: list[KernelSpec], target: str, jobs: int) -> list[Row | Exception]:
    def kernel(spec: KernelSpec):
        try:
            return _compile_one(spec, target)
        except Exception as error:  # whatever the compiler throws, the other configurations still count
            return error

    with ThreadPoolExecutor(jobs) as pool:  # threads: LLVM runs without the GIL, ptxas in a process of its own
        kernels = list(pool.map(kernel, specs))
    compiled = [i for i, found in enumerate(kernels) if not isinstance(found, Exception)]
    read = _read_nvidia if TARGETS[target].nvidia else _read_amd
    results = list(kernels)
    for i, (code, registers, spilled) in zip(compiled, read([kernels[i] for i in compiled], target)):
        try:
            results[i] = row_of(specs[i], target, code, registers, spilled, kernels[i].metadata.shared)
        except ValueError as error:  # its machine code has no path, or loop, to count
            results[i] = error
    return results


def _compile_one(spec: KernelSpec, target: str):
    signature = {name: spec.signature.get(name, "constexpr") for name in spec.fn.arg_names}
    divisible = [name for name, kind in signature.items() if kind.startswith("*") or name in spec.divisible]
    source = ASTSource(
        spec.fn,
        signature,
        constexprs=dict(spec.constexprs),
        attrs={(spec.fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": spec.fp_fusion}
    return triton.compile(source, target=TARGETS[target].gpu, options=options)


def row_of(spec: KernelSpec, target: str, code: list, registers: int, spilled: int, shared: int) -> Row:
    """The row of machine code `code` for `spec`.

    Raises:
        ValueError: the code has no path, or loop, to count.
    """
    per_thread = spec.values / (TARGETS[target].gpu.warp_size * spec.num_warps)
    load_bits, store_bits = machine_code.access_bits(code)
    return Row(
        spec.kernel,
        spec.config,
        target,
        registers,
        spilled,
        shared,
        round(machine_code.count_path(code, spec.loop) / per_thread, 4),
        round(spec.bytes_per_value, 5),
        spec.launches,
        load_bits,
        store_bits,
        machine_code.uses_mma(code),
    )


def _read_nvidia(kernels: list, target: str) -> list[tuple[list[machine_code.Instruction], int, int]]:
    """(instructions, registers, spilled bytes) of each kernel."""
    texts = [cubin.text_section(kernel.asm["cubin"], kernel.metadata.name) for kernel in kernels]
    found = []
    for kernel, listing in zip(kernels, cubin.disassemble(texts, TARGETS[target].gpu.arch)):
        code, used = machine_code.parse_sass(listing), cubin.usage(kernel.asm["cubin"], kernel.metadata.name)
        found.append((code, used.registers, max(used.stack_bytes, machine_code.spilled_bytes(code))))
    return found


def _read_amd(kernels: list, target: str) -> list[tuple[list[machine_code.Instruction], int, int]]:
    """(instructions, vector registers, spilled bytes) of each kernel."""
    texts = [kernel.asm["amdgcn"] for kernel in kernels]

    def count(name: str, text: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return [
        (machine_code.parse_amd(text), count("vgpr_count", text), 4 * count("vgpr_spill_count", text)) for text in texts
    ]


def _key(spec: KernelSpec, target: str) -> str:
    """Names a row in the cache: the kernel with all it calls, its configuration, the compiler, the counting."""
    stated = [(field.name, getattr(spec, field.name)) for field in fields(spec) if field.name != "fn"]
    counting = [Path(module.__file__).read_bytes() for module in (cubin, machine_code)] + [Path(__file__).read_bytes()]
    text = repr((spec.fn.cache_key, stated, target, TARGETS[target], triton.__version__, counting))
    return hashlib.sha256(text.encode()).hexdigest()


def cache_dir() -> Path:
    """Where rows are kept: `aot/` in `$QDORA_CACHE`, or in `.cache/` of the project."""
    return Path(os.environ.get("QDORA_CACHE") or Path(__file__).parents[2] / ".cache") / "aot"


def _load(key: str) -> Row | None:
    try:
        return Row(**json.loads((cache_dir() / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):  # not there, or half written
        return None


def _save(key: str, row: Row) -> None:
    cache_dir().mkdir(parents=True, exist_ok=True)
    (cache_dir() / f"{key}.json").write_text(json.dumps(asdict(row)))
