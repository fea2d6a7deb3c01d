"""A picture of the comparison: how many times as fast, or as small, each case is."""

from pathlib import Path

from experiments.bench.cases import Row

# Okabe and Ito's palette: distinct to colour-blind readers and in grey
COLOURS = {
    "step_s": "#0072b2",
    "peak_memory_gb": "#009e73",
    "generated_tokens_per_s": "#d55e00",
    "ns_per_weight": "#cc79a7",
}
LABELS = {
    "step_s": "training step, times as fast",
    "peak_memory_gb": "peak memory, times as small",
    "generated_tokens_per_s": "generation, times as fast",
    "ns_per_weight": "packing, times as fast as bitsandbytes",
}


def plot(path: Path, rows: list[Row]) -> None:
    from matplotlib.figure import Figure  # not pyplot: no display, and no global state

    ours = [row for row in rows if row.side == "ours"]
    figure = Figure(figsize=(9, 1.5 + 0.32 * len(ours)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(ours):
        axes.barh(y, row.ratio, color=COLOURS[row.metric], label=LABELS[row.metric])
        axes.text(row.ratio, y, f" {row.ratio:.2f}", va="center", fontsize="small")
    axes.axvline(1, color="0.3", lw=1)
    axes.set_xscale("log", base=2)  # one ratio may be ten times another, and half as fast as far from 1 as twice
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(ours)), [row.case for row in ours], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("PEFT + bitsandbytes over this project, in one run")
    axes.margins(x=0.1)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
