"""Check every op on this machine's GPU, time them, and print one short table: python -m kernels.bench.card

Each stage is a process with its own limit: one that hangs or fails costs its own results alone. Together the limits are
seven minutes, so that `python -m experiments.bench` fits into a quarter of an hour beside it.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import commands
from kernels.bench import card_arguments

TOKENS = 2048  # the size that the table shows, or the nearest one that was measured
RESULTS = Path("outputs") / "card"
_TESTS = (
    *("nf4", "absmax", "nf4_linear", "lora", "lora_kernels", "low_rank", "dora", "dora_kernels", "joined"),
    *("joined_kernels", "experts", "experts_kernels", "routing", "rms_norm", "swiglu", "rotary", "cross_entropy"),
    *("dropout", "adamw", "adamw8bit"),
)
_FILES = tuple(f"tests/kernels/test_{name}.py" for name in _TESTS)


@dataclass(frozen=True)
class Stage:
    """A process: its name, its arguments to Python, and the seconds it may take."""

    name: str
    arguments: Sequence[str]
    limit: int


def _bench(name: str, limit: int, *ops: str) -> Stage:
    return Stage(name, ("-m", "kernels.bench", *ops, "--seconds", "0.3", "--csv", str(RESULTS / f"{name}.csv")), limit)


STAGES = (
    # every op in bf16, which is what trains, and all that has no dtype; `make test` has the others
    Stage("check", ("-m", "pytest", "-q", "--maxfail=5", "-k", "not fp32 and not fp16", *_FILES), 150),
    _bench("products", 75, "gemm", "project", "outer"),
    _bench("blocks", 40, "rms_norm", "swiglu", "rotary", "linear_cross_entropy"),
    _bench("linears", 65, "lora_linear", "dora_linear"),
    _bench("experts", 40, "experts_lora", "experts_dora"),
    _bench("packed", 50, "nf4_linear", "nf4_dequantize", "nf4_quantize", "dora_norm"),
)


def main(argv: Sequence[str]) -> int:
    options = card_arguments.parse(argv)
    if not torch.cuda.is_available():
        print("error: no GPU: run this on a machine with one; `make test` proves the kernels without", file=sys.stderr)
        return 1
    return run([stage for stage in STAGES if stage.name in (options.stages or card_arguments.STAGES)])


def run(stages: Sequence[Stage]) -> int:
    """Run the stages; the exit code is 1 if one failed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for old in RESULTS.glob("*.csv"):
        old.unlink()
    outcomes = {}
    for stage in stages:
        print(f"\n== {stage.name}: at most {stage.limit} s", flush=True)
        try:
            code = subprocess.run([sys.executable, *stage.arguments], timeout=stage.limit).returncode
            outcomes[stage.name] = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            outcomes[stage.name] = f"stopped after {stage.limit} s"
    print("\n== summary")
    for name, outcome in outcomes.items():
        print(f"{name:<10} {outcome}")
    rows = [row for path in sorted(RESULTS.glob("*.csv")) for row in _read(path)]
    print(*summary(rows), sep="\n")
    return 0 if set(outcomes.values()) == {"passed"} else 1


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """A line for each op and configuration: our time in a graph, its share of the roofline, peers' times over it."""
    found: dict[tuple[str, str], dict[int, dict[str, Mapping[str, str]]]] = {}
    for row in rows:
        if row["metric"] == "graph_ns":
            found.setdefault((row["kernel"], row["config"]), {}).setdefault(int(row["x"]), {})[row["provider"]] = row
    lines = [f"{'op':<22}{'size':>12}{'µs':>10}{'roofline':>10}  time/ours"]
    for (kernel, config), sizes in found.items():
        x = min(sizes, key=lambda size: abs(size - TOKENS))
        ours = sizes[x].get("ours")
        if ours is None:
            lines.append(f"{kernel:<22}{x:>12,}   ours has no time: {config}")
            continue
        peers = (
            f"{name} {float(row['p50']) / float(ours['p50']):.2f}" for name, row in sizes[x].items() if name != "ours"
        )
        shape = " ".join(f"{key}={value}" for key, value in json.loads(config).items())
        time, share = float(ours["p50"]) / 1000, float(ours["roofline_share"])
        lines.append(f"{kernel:<22}{x:>12,}{time:>10,.1f}{share:>10.0%}  {', '.join(peers)}   {shape}")
    return lines


if __name__ == "__main__":
    commands.run(main)
