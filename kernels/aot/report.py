"""Rows as a table for the terminal and as a CSV file."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from kernels.aot.compiler import Row
from kernels.aot.roofline import GPUS
from kernels.aot.targets import TARGETS
from kernels.triton.case import Case

_LINE = "{:1} {:<28} {:<7} {:>4} {:>6} {:>9} {:>8} {:>8} {:>7} {:>7} {:>5} {:>6} {:>4}  {}"
_HEAD = (
    ("", "", "", "", "spill", "shared", "instr", "bytes", "kernels", "FLOP", "load", "store", "", "roofline: least"),
    ("", "config", "target", "regs", "bytes", "KiB", "a weight", "a weight", "an op", "a byte", "bits", "bits", "mma"),
)
NOTES = """\
A weight is a value of the kernel: of a matrix product, a multiply-add of its main loop, or an element of its input.
shared: used / allowed for a block. Roofline: a bound from public figures of that GPU (kernels/aot/roofline.py), not a
measurement, and its cause: memory; mma, the matrix units; issue, the rate of instructions; mix, memory or issue,
depending on which instructions they are. sm_75 has no bf16, and Triton has no matrix instructions for it. There
products are the library's, so their kernels are not compiled for it."""


def table(results: Iterable[tuple[Case, Row]], marked: set[Row]) -> str:
    """A line a row, grouped by kernel; rows in `marked` carry a "!"."""
    lines = [_LINE.format(*_HEAD[0]), _LINE.format(*_HEAD[1], "time a weight")]
    kernel = config = None
    for case, row in results:
        if row.kernel != kernel:
            kernel, config = row.kernel, None
            lines.append(f"\n{kernel}")
        lines.append(_line(case, row, "" if row.config == config else row.config, row in marked))
        config = row.config
    return "\n".join(lines)


def _line(case: Case, row: Row, config: str, marked: bool) -> str:
    flops = case.count(case.flops_per_value)
    limit = TARGETS[row.target].shared_limit
    return _LINE.format(
        "!" if marked else "",
        config,
        row.target,
        row.registers,
        row.spill_bytes,
        f"{row.shared_bytes / 1024:.1f}/{limit // 1024}",
        f"{row.instr_per_weight:.2f}" if row.instr_per_weight >= 1 else _short(row.instr_per_weight),
        _short(row.bytes_per_weight) if row.bytes_per_weight < 0.1 else f"{row.bytes_per_weight:.3f}",
        row.launches,
        _short(flops / case.bytes_per_value) if flops else "-",
        row.load_bits,
        row.store_bits,
        "yes" if row.mma else "-",
        _roofline(case, row),
    ).rstrip()


def _roofline(case: Case, row: Row) -> str:
    if not (gpu := GPUS.get(row.target)):
        return ""
    flops = case.count(case.flops_per_value) if row.mma else 0.0  # elsewhere they are among the instructions
    seconds, cause = gpu.bound(row.instr_per_weight, case.bytes_per_value, flops)
    return f"{gpu.name} {_short(seconds * 1e12)} ps, {cause}"


def _short(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value >= 0.001 else f"{value:.5f}"


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
