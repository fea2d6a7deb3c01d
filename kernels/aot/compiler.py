"""Compile cases for one target and read the machine code. Rows are cached: only a changed case is compiled again."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.aot import cubin, machine_code
from kernels.aot.targets import TARGETS
from kernels.triton.case import Case
from kernels.triton.launch import Launch


@dataclass(frozen=True)
class Row:
    """The machine code of one case on one target: a line of the table and of the CSV file."""

    kernel: str
    config: str
    target: str
    registers: int  # a thread
    spill_bytes: int  # a thread's stack, or its stores to it, whichever is more
    shared_bytes: int  # a block
    instr_per_weight: float  # a value of the kernel, a weight for most
    bytes_per_weight: float
    launches: int
    load_bits: int
    store_bits: int
    mma: bool


def compile_all(cases: Sequence[Case], target: str, jobs: int) -> list[Row | Exception]:
    """A row for each case, or the exception that stopped it."""
    keys = [_key(case, target) for case in cases]
    results: dict[str, Row | Exception] = {key: row for key in keys if (row := _load(key))}
    todo = {key: case for key, case in zip(keys, cases) if key not in results}
    results |= zip(todo, _compile(list(todo.values()), target, jobs))
    for key in todo:
        if isinstance(row := results[key], Row):
            _save(key, row)
    return [results[key] for key in keys]


def _compile(cases: list[Case], target: str, jobs: int) -> list[Row | Exception]:
    def kernel(case: Case):
        try:
            return _compile_one(case, target)
        except Exception as error:  # the compiler may throw anything, and the other cases still count
            return error

    with ThreadPoolExecutor(jobs) as pool:  # threads: LLVM runs without the GIL, ptxas in a process of its own
        kernels = list(pool.map(kernel, cases))
    compiled = [i for i, found in enumerate(kernels) if not isinstance(found, Exception)]
    read = _read_nvidia if TARGETS[target].nvidia else _read_amd
    results = list(kernels)
    for i, (code, registers, spilled) in zip(compiled, read([kernels[i] for i in compiled], target)):
        try:
            made = kernels[i].metadata
            results[i] = row_of(cases[i], target, code, made.num_warps, registers, spilled, made.shared)
        except ValueError as error:  # its machine code has no path, or loop, to count
            results[i] = error
    return results


def _compile_one(case: Case, target: str):
    source, options = source_of(case.launch, target)
    return triton.compile(source, target=TARGETS[target].gpu, options=options)


def source_of(launch: Launch, target: str) -> tuple[ASTSource, dict]:
    """The source and the options that Triton compiles for this launch on this target.

    Triton's own code derives them from the arguments, as `kernel[grid](...)` does: the types, the constants (an integer
    that is 1 is one), which integers and addresses are multiples of 16, and the options that the launcher leaves open.
    """
    kernel, backend = launch.kernel, make_backend(TARGETS[target].gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, options = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, arguments, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def row_of(case: Case, target: str, code: list, num_warps: int, registers: int, spilled: int, shared: int) -> Row:
    """The row of machine code `code` for `case`.

    Raises:
        ValueError: the code has no path, or loop, to count.
    """
    per_thread = case.count(case.values) / (TARGETS[target].gpu.warp_size * num_warps)
    load_bits, store_bits = machine_code.access_bits(code)
    return Row(
        case.kernel,
        case.config,
        target,
        registers,
        spilled,
        shared,
        round(machine_code.count_path(code, case.count(case.loop)) / per_thread, 4),
        round(case.bytes_per_value, 5),
        case.launches,
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


def _key(case: Case, target: str) -> str:
    """Names a row in the cache by all that decides it: kernel, callees, launch, case, target, compilers, counting."""
    source, options = source_of(case.launch, target)
    launch = (source.signature, source.constants, source.attrs, options)
    stated = (case.kernel, case.config, case.count(case.values), case.bytes_per_value, case.count(case.loop))
    counting = [Path(module.__file__).read_bytes() for module in (cubin, machine_code)] + [Path(__file__).read_bytes()]
    text = repr((case.fn.cache_key, launch, stated, case.launches, TARGETS[target], triton.__version__, counting))
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
