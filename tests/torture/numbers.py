"""Numbers that are none: NaN and infinity in weights, inputs and gradients; lr=10; fp16 that overflows.

The rule: before training a held-out loss that is not a number is refused. In training a step whose loss or gradients
are not numbers changes no weight and ends the run, with the weights of the last good step. In fp16 the scaler skips
such a step and halves its scale until that is 1.
"""

import itertools
import math
import shutil
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

import kernels
from experiments.training import gradients
from tests.experiments.helpers import CHECKPOINTS, SMALL, TINY, records, tiny, write_chats
from tests.torture.full import start
from tests.torture.guarded import guards

METHODS = ("full", "lora", "qlora", "dora", "qdora", "bitfit", "houlsby", "prefix_embed", "prefix_layer")
BAD = (math.nan, math.inf, -math.inf)
KINDS = ("weights", "gradients", "loss", "lr", "fp16")


def campaign(count: int, folder: Path, seed: int = 0) -> list[str]:
    """Train `count` times with bad numbers; a line for each run that did not end by the rule."""
    findings = _kernels()
    begin = [*TINY, "data=jsonl", f"data.path={write_chats(folder)}", *CHECKPOINTS, *SMALL, "lr=1e-2"]
    combinations = list(itertools.product(KINDS, METHODS))
    Random(seed).shuffle(combinations)
    for number in range(count):
        rng = Random(f"{seed} {number}")
        kind, method = combinations[number % len(combinations)]
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        found = _once(kind, [*begin, f"+method={method}", f"output_dir={out}"], folder, rng)
        findings += [f"numbers {number} ({method}, {kind}): {one}" for one in found]
    return findings


def _once(kind: str, arguments: list[str], folder: Path, rng: Random) -> list[str]:
    out, bad, at = folder / "out", rng.choice(BAD), rng.randint(2, 6)
    if kind == "weights":
        return _bad_weights(arguments, folder, bad, rng)
    if kind == "lr":
        code, text = start([*arguments, "lr=10", "trainer.max_grad_norm=0", "trainer.steps=12"])
        return _judge(code, text, out, None)
    if kind == "fp16":
        code, text = start([*arguments, "trainer.dtype=float16", "lr=1"])
        return _judge(code, text, out, None)
    calls, whole = itertools.count(1), gradients.accumulate

    def accumulate(label_loss, *more):
        loss, step = whole(label_loss, *more), next(calls)
        if step == at and kind == "gradients":
            trained = [p for p in label_loss.model.parameters() if p.grad is not None]
            trained[rng.randrange(len(trained))].grad.view(-1)[0] = bad
        return bad if step == at and kind == "loss" else loss

    from experiments.training import loop

    loop.accumulate = accumulate
    try:
        code, text = start(arguments)
    finally:
        loop.accumulate = whole
    return _judge(code, text, out, at)


def _bad_weights(arguments: list[str], folder: Path, bad: float, rng: Random) -> list[str]:
    model, tokenizer = tiny()
    with torch.no_grad():
        parameter = rng.choice([p for name, p in model.named_parameters() if "embed" not in name])
        parameter.view(-1)[rng.randrange(parameter.numel())] = bad
    shutil.rmtree(folder / "bad", ignore_errors=True)
    model.save_pretrained(folder / "bad")
    tokenizer.save_pretrained(folder / "bad")
    told = [one for one in arguments if one != "model=tiny"]
    code, text = start([*told, "model=hf", f"model.path={folder / 'bad'}"])
    if code == 0:
        return ["it trained on weights that are not numbers"]
    return (
        [] if text.count("\nerror: ") + text.startswith("error: ") == 1 and "Traceback" not in text else [text[-500:]]
    )


def _judge(code: int, text: str, out: Path, at: int | None) -> list[str]:
    """What is wrong with a run that met bad numbers, at step `at` if that is known."""
    found = []
    if "Traceback" in text:
        found.append(text[-600:])
    steps = [record for record in records(out) if "loss" in record]
    if at is not None and (code == 0 or len(steps) != at - 1):
        found.append(f"exit code {code} after {len(steps)} steps, and step {at} was bad: {text[-200:]}")
    if any(not math.isfinite(record["loss"]) for record in steps):
        found.append("a loss that is not a number in metrics.jsonl")
    if code and not any(word in text for word in (": stopped with the weights of step", "before training, in float")):
        found.append(f"it does not say why: {text[-300:]}")
    for path in out.rglob("*.safetensors"):
        if bad := [
            name
            for name, tensor in load_file(path).items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]:
            found.append(f"{path.relative_to(out)}: {bad[0]} is not finite")
    return found


def _kernels() -> list[str]:
    """Every kernel that a step needs, between guard bands, on inputs with and without bad numbers."""
    findings = []
    backends = (["triton"] if kernels.columns.interpreting() or torch.cuda.is_available() else []) + [
        "cpu",
        "reference",
    ]
    for backend, bad in itertools.product(backends, (None, *BAD)):
        try:
            with guards(), kernels.use_backend(backend):
                _layer(bad, torch.bfloat16 if backend == "cpu" else torch.float32)
        except Exception as error:
            findings.append(f"numbers: kernels of {backend} with {bad}: {error!r}"[:400])
    return findings


def _layer(bad: float | None, dtype: torch.dtype) -> None:
    """One linear of QDoRA and one of QLoRA, forward and backward, of odd sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 96, generator=generator).to(dtype)
    if bad is not None:
        x[3, 5] = bad
    w = torch.randn(80, 96, generator=generator)
    weight = kernels.Weight(*kernels.quantize_4bit(w.to(dtype), blocksize=64, double_quant=True))
    A, B = torch.randn(5, 96, generator=generator) / 10, torch.randn(80, 5, generator=generator) / 10
    leaves = [tensor.requires_grad_() for tensor in (x, A, B, torch.ones(80))]
    for y in (
        kernels.lora_linear(leaves[0], weight, leaves[1], leaves[2], scaling=2.0),
        kernels.dora_linear(leaves[0], weight, kernels.weight_norm_sq(weight), *leaves[1:], scaling=2.0),
    ):
        good = torch.arange(7) != 3
        if not y[good].isfinite().all():
            raise AssertionError("a row that has no bad number got one")
        if bad is not None and y[~good].isfinite().all():
            raise AssertionError("a bad number got lost")
        y.float().sum().backward()
