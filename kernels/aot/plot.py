"""A picture of static cost: instructions a weight, ours and bitsandbytes', beside the roofline's break-even."""

from pathlib import Path

from kernels.aot.compiler import Row
from kernels.aot.roofline import GPUS
from kernels.triton.case import Case

# Drawn are one configuration or more of each op whose values are weights, with a label. Panels from top to bottom.
_OURS = {
    "nf4_dequantize": {"b64-double-bf16": "ours, absmax in 8 bits", "b64-bf16": "ours, absmax in fp32"},
    "nf4_quantize": {"b64-bf16": "ours"},
    "dora_norm_nf4": {f"r{rank}-b64-double-bf16": f"ours, rank {rank}" for rank in (16, 64, 128, 256)},
}
_PEERS = {
    "bitsandbytes-cuda-b64-bf16": "bitsandbytes, CUDA, absmax in fp32",
    "bitsandbytes-triton-b64-bf16": "bitsandbytes, Triton, absmax in fp32",
}
_TITLES = {
    "nf4_dequantize": "NF4 dequantize to bf16, block 64",
    "nf4_quantize": "NF4 quantize from bf16, block 64",
    "dora_norm_nf4": "DoRA norm from NF4, block 64 (no installed package has a kernel for it)",
}
# Okabe and Ito's palette and a marker each: distinct to colour-blind readers and in grey
_STYLES = {"sm_80": ("#0072b2", "o"), "sm_90": ("#d55e00", "s"), "sm_100": ("#009e73", "^")}


def plot(path: Path, results: list[tuple[Case, Row]]) -> None:
    """Draw the `results` that are named above, one panel an op.

    Raises:
        ValueError: there are none.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, and no global state

    panels = {kernel: _lines(kernel, results) for kernel in _OURS}
    panels = {kernel: lines for kernel, lines in panels.items() if lines}
    if not panels:
        raise ValueError(f"nothing to draw: the picture shows {', '.join(_OURS)} on {', '.join(GPUS)}")
    heights = [len(lines) + 1 for lines in panels.values()]
    figure = Figure(figsize=(9, 1.6 + 0.36 * sum(heights) + 0.5 * len(panels)), layout="constrained")
    for axes, (kernel, lines) in zip(
        figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)[:, 0], panels.items()
    ):
        _draw(axes, lines)
        axes.set_title(_TITLES[kernel], loc="left", fontsize="medium")
    axes.set_xlabel(
        "SASS instructions a weight: static cost, not speed\n"
        "left of a GPU's break-even bar memory is its bound, right of the bar it no longer is"
    )
    axes.set_xscale("log")
    ticks = (1, 2, 4, 8, 16, 32, 64, 128)
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.set_xlim(1, 128)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _lines(kernel: str, results: list[tuple[Case, Row]]) -> dict[str, list[tuple[Case, Row]]]:
    """Results to draw in the panel of `kernel`, by label."""
    labels = _OURS[kernel] | _PEERS
    lines: dict[str, list[tuple[Case, Row]]] = {}
    for config, label in labels.items():
        here = [r for r in results if r[1].kernel == kernel and r[1].config == config and r[1].target in GPUS]
        if here:
            lines[label] = here
    return lines


def _draw(axes, lines: dict[str, list[tuple[Case, Row]]]) -> None:
    ours, _ = next(iter(lines.values()))[0]
    for step, (target, gpu) in enumerate(GPUS.items()):
        colour, marker = _STYLES[target]
        dodge = 0.2 * (step - 1)  # a GPU's marks are a little above or below another's
        x, y = [], []
        for i, here in enumerate(lines.values()):
            x += [row.instr_per_weight for _, row in here if row.target == target]
            y += [i + dodge] * (len(x) - len(y))
        axes.plot(x, y, marker, color=colour, ms=6, ls="", label=f"{gpu.name} ({target})")
        lower, upper = gpu.break_even(ours.bytes_per_value)
        axes.plot([lower, upper], [dodge - 1] * 2, color=colour, lw=4, label=f"{gpu.name} break-even")
        axes.axvline(lower, color=colour, ls="--", lw=1)
    for y, here in enumerate(lines.values()):
        counts = [row.instr_per_weight for _, row in here]
        low, high = f"{min(counts):.1f}", f"{max(counts):.1f}"
        axes.text(max(counts) * 1.06, y, low if low == high else f"{low} – {high}", va="center", fontsize="small")
    axes.set_yticks(range(-1, len(lines)), ["break-even", *lines], fontsize="small")
    axes.set_ylim(len(lines) - 0.4, -1.5)
    axes.grid(axis="y", alpha=0.3)
