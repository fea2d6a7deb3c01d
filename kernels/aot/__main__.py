"""`python -m kernels.aot`: see the package's docstring."""

import fnmatch
import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from kernels import commands, triton
from kernels.aot.arguments import parse
from kernels.aot.compiler import Row, cache_dir, compile_all
from kernels.aot.peers import peers
from kernels.aot.plot import plot
from kernels.aot.report import NOTES, table, write_csv
from kernels.aot.targets import TARGETS
from kernels.op import interpreting
from kernels.triton.case import Case


def all_cases() -> list[Case]:
    """The `CASES` of every file in kernels/triton/."""
    files = [module.name for module in pkgutil.iter_modules(triton.__path__, "kernels.triton.")]
    return [case for name in files for case in getattr(importlib.import_module(name), "CASES", ())]


def select(cases: Iterable[Case], patterns: list[str]) -> list[Case]:
    """The cases that match any pattern, all without a pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """
    cases = list(cases)
    chosen = []
    for pattern in patterns or ["*"]:
        found = [c for c in cases if c.kernel == pattern or fnmatch.fnmatch(f"{c.kernel}/{c.config}", pattern)]
        if not found:
            names = ", ".join(sorted({case.kernel for case in cases}))
            raise ValueError(f"no kernel matches {pattern!r}; there are {names}")
        chosen += [case for case in found if case not in chosen]
    return chosen


def violations(case: Case, row: Row) -> list[str]:
    """Each way in which `row` is over the budget of `case` or beyond the hardware."""
    target = TARGETS[row.target]
    found = []
    if row.spill_bytes:
        found.append(f"spills {row.spill_bytes} bytes")
    if row.shared_bytes > target.shared_limit:
        found.append(f"needs {row.shared_bytes} bytes of shared memory, the GPU has {target.shared_limit}")
    if not target.nvidia:
        return found
    max_instr = case.max_instr_on.get(row.target, case.max_instr)
    if max_instr is not None and row.instr_per_weight > max_instr:
        found.append(f"{row.instr_per_weight} instructions a weight, budget {max_instr}")
    if row.registers > case.max_registers:
        found.append(f"{row.registers} registers, budget {case.max_registers}")
    if row.load_bits < case.min_load_bits:
        found.append(f"{row.load_bits}-bit loads, budget {case.min_load_bits}")
    if row.store_bits < case.min_store_bits:
        found.append(f"{row.store_bits}-bit stores, budget {case.min_store_bits}")
    if case.mma and not row.mma:
        found.append("does not use the matrix units")
    return found


def run(
    cases: list[Case],
    targets: list[str],
    jobs: int = 2,
    with_peers: bool = False,
    csv_file: Path | None = None,
    plot_file: Path | None = None,
) -> int:
    """Compile `cases` for `targets`, print a table, write the files.

    Returns:
        1 if a case is over budget or does not compile, else 0.
    """
    results, uncompiled, failures, over = [], [], [], set()
    for target in targets:
        start = time.perf_counter()
        here = [case for case in cases if _runs_on(case, target)]
        for case, row in zip(here, compile_all(here, target, jobs)):
            name = f"{case.kernel}/{case.config} on {target}"
            if isinstance(row, Exception):
                uncompiled.append(f"{name}: {type(row).__name__}: {row}")
                continue
            results.append((case, row))
            if broken := violations(case, row):
                over.add(row)
                failures += [f"{name}: {what}" for what in broken]
        print(f"{target}: {len(here)} configurations, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    theirs, notes = peers({case.kernel for case in cases}, targets, jobs) if with_peers or plot_file else ([], [])
    results = _in_order(results + theirs)
    rows = [row for _, row in results]
    print(table(results, over), "\n".join([NOTES, *notes]), sep="\n\n")
    if csv_file:
        write_csv(csv_file, rows)
    if plot_file:
        plot(plot_file, results)
    print(f"{len(rows)} compiled or read, {len(uncompiled)} not compiled, {len(over)} over budget")
    for failure in uncompiled:
        print(f"DOES NOT COMPILE {failure}", file=sys.stderr)
    for failure in failures:
        print(f"OVER BUDGET {failure}", file=sys.stderr)
    return 1 if uncompiled or failures else 0


def _runs_on(case: Case, target: str) -> bool:
    has = TARGETS[target]
    if case.only_on and target not in case.only_on:
        return False
    return (has.bf16 or not case.uses_bf16) and (has.mma or not case.mma)


def _in_order(results: list[tuple[Case, Row]]) -> list[tuple[Case, Row]]:
    """Sorted by kernel, then configuration, then target, each in the order in which they first come."""
    kernels = list(dict.fromkeys(row.kernel for _, row in results))
    configs = list(dict.fromkeys((row.kernel, row.config) for _, row in results))
    return sorted(results, key=lambda r: (kernels.index(r[1].kernel), configs.index((r[1].kernel, r[1].config))))


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        cases = select(all_cases(), options.pattern)
        cache_dir().mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        return _error(str(error))
    except OSError as error:
        return _error(f"cannot write to {cache_dir()}: {error.strerror}; set QDORA_CACHE to a folder")
    if interpreting():
        print("TRITON_INTERPRET=1 leaves nothing to compile: starting again without it", file=sys.stderr, flush=True)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "kernels.aot", *argv], environment)
    return run(cases, options.targets, options.jobs, options.peers, options.csv, options.plot)


def _error(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    commands.run(main)
