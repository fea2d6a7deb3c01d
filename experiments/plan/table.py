"""The plan as the terminal shows it."""

import torch

from experiments.config import Config
from experiments.plan.budget import PAGED_MB, Budget
from experiments.plan.cards import CARDS, RESERVE, Card, card
from experiments.plan.simulate import Step
from experiments.runs.identity import identity


def heading(cfg: Config, dtype: torch.dtype) -> str:
    rank = f", rank {cfg.rank}" if "rank" in identity(cfg) else ""
    dtype_name = str(dtype).removeprefix("torch.")
    tokens = f"{cfg.batch} × {cfg.seq}"
    if cfg.data.packing:
        tokens = f"packs of {cfg.trainer.tokens or cfg.batch * cfg.seq}"
    return f"{cfg.model.name}, {cfg.method.name}{rank}: {tokens} tokens in {dtype_name}"


def table(cfg: Config, needs: Budget) -> str:
    """Every part of `needs`, the totals on 1 to cfg.gpus GPUs, the cards it fits, FLOPs and hours."""
    share = needs.trained / needs.parameters
    lines = [
        f"{needs.parameters:,} parameters, of which {needs.trained:,} train ({share:.3%}); "
        f"{needs.bits:.3f} bits a weight in the linears",
        *_active(needs),
        "",
        *_parts(cfg, needs),
        "",
        *_gpus(cfg, needs),
        "",
        *_cards(cfg, needs),
        "",
        *_hours(cfg, needs),
    ]
    return "\n".join(lines)


def _active(needs: Budget) -> list[str]:
    idle = needs.step(False).idle
    return [f"{needs.parameters - idle:,} of them compute for a token, those of its experts and the others"] * bool(
        idle
    )


def _row(name: str, size: int, note: str = "") -> str:
    return f"{name:<38}{size:>21,}{size / 1e9:>10.3f}   {note}".rstrip()


def _parts(cfg: Config, needs: Budget) -> list[str]:
    optim = cfg.optim.name
    lines = [f"{'':<38}{'bytes':>21}{'GB':>10}"]
    if needs.packed:
        lines.append(_row("weights, packed", needs.packed))
        lines.append(_row("quantization constants", needs.constants))
    lines.append(_row("weights, not packed", needs.dense))
    if needs.adapters:
        lines.append(_row("adapters", needs.adapters))
    lines.append(_row("gradients", needs.gradients))
    names = {"adamw": "AdamW, fp32", "adamw8bit": "AdamW, 8 bits"}
    counted = ", counted below"
    for name, size in needs.states.items():
        chosen = counted if name == optim and not cfg.optim.paged else ""
        lines.append(_row(f"optimizer state: {names[name]}", size, f"optim={name}{chosen}"))
    elsewhere = max(needs.states[optim] - needs.paged, 0) / 1e9
    pages = f"optim.paged=true optim.budget_mb={cfg.optim.budget_mb or PAGED_MB}{counted if cfg.optim.paged else ''}"
    lines.append(_row(f"  {optim} in pages, on the GPU", needs.paged, f"{pages}; {elsewhere:.3f} GB on the host"))
    plain, checkpointed = needs.step(False), needs.step(True) if needs.checkpoints else None
    lines.append(_row("activations", plain.activations, "kept for backward"))
    if checkpointed:
        note = "trainer.gradient_checkpointing=true"
        if checkpointed.host:
            note += f" offload_activations=true; {checkpointed.host / 1e9:.3f} GB on the host"
        lines.append(_row("  with checkpointing", checkpointed.activations, note))
    lines.append(
        _row("loss, on top", plain.loss, f"in chunks; whole, the fp32 logits alone are {needs.logits / 1e9:.3f} GB")
    )
    if plain.weight:
        lines.append(_row("largest dequantized weight", plain.weight))
    lines.append(_row("peak of a step", needs.peak(False), f"in {plain.phase}"))
    if checkpointed:
        lines.append(_row("  with checkpointing", needs.peak(True), f"in {checkpointed.phase}"))
    return lines


def _gb(size: int | None) -> str:
    return "cannot" if size is None else f"{size / 1e9:.3f}"


def _kinds(needs: Budget) -> list[bool]:
    return [False, True] if needs.checkpoints else [False]


def counts(gpus: int) -> list[int]:
    """1, 2, 4, … up to `gpus`, and `gpus` itself."""
    return sorted({2**i for i in range(gpus.bit_length())} | {gpus})


def _gpus(cfg: Config, needs: Budget) -> list[str]:
    titles = "".join(f"{title:>26}" for title in ("plain", "with checkpointing")[: len(_kinds(needs))])
    lines = [
        f"{'GB on each GPU':<16}{titles}",
        f"{'GPUs':>16}" + f"{'replicated':>14}{'sharded':>12}" * len(_kinds(needs)),
    ]
    for n in counts(cfg.gpus):
        cells = (f"{_gb(needs.replicated(n, kind)):>14}{_gb(needs.sharded(n, kind)):>12}" for kind in _kinds(needs))
        lines.append(f"{n:>16}{''.join(cells)}")
    return lines


def _cards(cfg: Config, needs: Budget) -> list[str]:
    """The fewest GPUs of each kind on which it fits."""
    titles = "".join(f"{title:>26}" for title in ("plain", "with checkpointing")[: len(_kinds(needs))])
    lines = [f"{f'fits, {RESERVE / 1e9:.1f} GB left free':<24}{titles}"]
    for one in CARDS.values():
        cells = (f"{_fewest(cfg, needs, one.usable_bytes, kind):>26}" for kind in _kinds(needs))
        lines.append(f"{one.name:<24}{''.join(cells)}{_in_fp16(cfg, one)}")
    return lines


def _in_fp16(cfg: Config, one: Card) -> str:
    """What to set where the card lacks the dtype that is planned; a run would take fp32, twice the bytes."""
    return "" if one.bf16 or cfg.trainer.dtype not in ("auto", "bfloat16") else "   with trainer.dtype=float16"


def _fewest(cfg: Config, needs: Budget, room: int, checkpointing: bool) -> str:
    if needs.peak(checkpointing) <= room:
        return "1 GPU"
    for n in counts(cfg.gpus):
        for how, size in (
            ("replicated", needs.replicated(n, checkpointing)),
            ("sharded", needs.sharded(n, checkpointing)),
        ):
            if size is not None and size <= room:
                return f"{n} GPUs, {how}"
    return f"not on {cfg.gpus}"


def _hours(cfg: Config, needs: Budget) -> list[str]:
    one = card(cfg.gpu)

    def row(name: str, step: Step) -> str:
        flops = step.flops / needs.tokens
        speed = one.tflops * 1e12 * cfg.utilisation / flops
        hours = cfg.tokens / speed / 3600
        return f"{name:<24}{flops:>14.3e}{speed:>14,.0f}{hours:>14,.1f}{hours / cfg.gpus:>14,.1f}"

    speed = f"{one.tflops:g} TFLOP/s{_in_fp16(cfg, one)}"
    lines = [
        f"{cfg.tokens:,.0f} tokens on {one.name}, at {cfg.utilisation:.0%} of {speed}",
        f"{'':<24}{'FLOPs a token':>14}{'tokens/s':>14}{'hours':>14}{f'on {cfg.gpus} GPUs':>14}",
        row("plain", needs.step(False)),
    ]
    return [*lines, row("with checkpointing", needs.step(True))] if needs.checkpoints else lines
