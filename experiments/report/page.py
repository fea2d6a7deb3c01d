"""The report as text: the same sections as Markdown and as one HTML page that needs nothing beside it."""

import base64
import csv
import html
import io
import itertools
from dataclasses import dataclass, field

from experiments.report.plots import Picture
from experiments.report.statistics import SAME_COST, Difference, Mean, Verdict, mean, method_differences, verdict
from experiments.runs.groups import MEASURES, Group, Run, disagreements, shown, why_times_differ

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:84em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto;font-size:.85em}
th,td{padding:.25em .6em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}th:first-child,td:first-child{text-align:left}
img{max-width:100%}figure{margin:1.5em 0}
figcaption,details{color:#444;font-size:.9em}code{font-size:.9em}"""


LEARNED = {  # measures and their columns, beside the losses; those that no run of a group has are left out
    "token_accuracy_after": "token accuracy",
    "exact_match_after": "exact match",
    "valid_after": "valid",
    "second_loss_rise": "second loss rose by",
    "effective_rank": "effective rank",
    "expert_imbalance": "busiest expert over its even share",
    "experts_without_tokens": "experts without a token",
}
COST = {
    "train_seconds": "training time",
    "total_seconds": "time in all",
    "peak_memory_bytes": "peak memory",
    "cpu_energy_joules": "energy",
    "trainable_params": "trained parameters",
    "adapter_bytes": "adapter",
    "base_bytes": "base",
    "bits_per_weight": "bits a weight",
}


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Section:
    """A heading, paragraphs or list items, tables by title, pictures by the name of their file."""

    title: str
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)


def as_csv(groups: list[Group]) -> str:
    """A row a run, all groups together: its name, every value of its configuration, every number it measured."""
    runs = [(number, run) for number, group in enumerate(groups, start=1) for run in group.runs]
    configured = sorted({key for _, run in runs for key in run.config} - {"seed"})
    others = sorted({name for _, run in runs for name in run.measures} - MEASURES.keys())
    first = ["run", "config_hash", "results_version", "group", "seed"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*first, *configured, *MEASURES, *others])
    for number, run in runs:
        config = [shown(run.config[key]) if key in run.config else "" for key in configured]
        measured = [run.measures.get(name, "") for name in (*MEASURES, *others)]
        writer.writerow([run.name, run.identity, run.version, number, run.seed, *config, *measured])
    return text.getvalue()


def sections(folder: str, groups: list[Group], problems: list[str], pictures: list[list[Picture]]) -> list[Section]:
    runs = sum(len(group.runs) for group in groups)
    first = Section(f"Report on {folder}", [f"{runs} runs. Every run is a row of runs.csv."])
    if len(groups) > 1:
        first.lines.append(
            f"They are of {len(groups)} kinds that cannot be compared (another model, other data, or results of "
            "another version) and are kept apart below."
        )
    if problems:
        told = "file was" if len(problems) == 1 else "files were"
        first.lines.append(f"{len(problems)} {told} left out or {'is' if len(problems) == 1 else 'are'} not whole:")
        first.lines += [f"- {problem}" for problem in problems]
    return [first, *(_section(n, group, drawn) for n, (group, drawn) in enumerate(zip(groups, pictures), start=1))]


def _section(number: int, group: Group, drawn: list[Picture]) -> Section:
    settings = group.settings()
    found = verdict(settings)
    section = Section(group.title, _conclusions(settings, found))
    section.lines += [f"- Compare with care: runs {line}." for line in disagreements(group.runs)]
    section.tables = [_learned_table(settings, found), _cost_table(settings)]
    if rows := method_differences(group):
        section.tables.append(_differences_table(rows))
    section.pictures = {f"{number}-{picture.name}.png": picture for picture in drawn}
    return section


def _conclusions(settings: dict[str, list[Run]], found: Verdict) -> list[str]:
    best = mean(settings[found.best], "loss_after")
    lines = [f"- Lowest held-out loss: **{found.best}**, {spread(best, 4)} nats a token ({_seeds(best.n)})."]
    if len(settings) == 1:
        return lines
    if len(found.level_with) > 1:
        others = ", ".join(label for label in found.level_with if label != found.best)
        lines.append(f"- The seeds do not tell it from {others}: the 95 % interval of the paired difference holds 0.")
    if found.unknown:
        lines.append(
            f"- Nothing can be said about the difference of {len(found.unknown)} settings from it: they have fewer "
            "than two seeds in common with it."
        )
    costs = {"train_seconds": "the least training time", "peak_memory_bytes": "the least memory"}
    costs["trainable_params"] = "the fewest trained parameters"
    if why := why_times_differ([run for runs in settings.values() for run in runs]):
        del costs["train_seconds"]
        lines.append(f"- Training times are not compared: {why}.")
    for measure, what in costs.items():
        label = found.cheapest(settings, measure)
        value = number(measure, mean(settings[label], measure))
        costs_of = [mean(settings[level], measure).mean for level in found.level_with]
        same = 0 if measure == "trainable_params" else SAME_COST  # parameters are counted, not measured
        if len(costs_of) > 1 and max(costs_of) - min(costs_of) <= same * max(costs_of):
            apart = f"no more than {same:.0%} apart" if same else "equal"
            lines.append(f"- Of those none has {what}: they are {apart}, {value}.")
            continue
        lines.append(f"- Of those {'' if len(found.level_with) > 1 else '(it alone) '}{what}: **{label}**, {value}.")
    for measure, (what, direction) in {
        "exact_match_after": ("Most right answers", -1),
        "second_loss_rise": ("Least forgotten (rise of the loss on the second domain)", 1),
    }.items():
        measured = {label: mean(runs, measure) for label, runs in settings.items()}
        measured = {label: m for label, m in measured.items() if m.n}
        if len({m.mean for m in measured.values()}) > 1:
            label = min(measured, key=lambda label: direction * measured[label].mean)
            lines.append(f"- {what}: **{label}**, {number(measure, measured[label])}.")
    return lines


def _seeds(n: int) -> str:
    return "one seed, so no spread is known" if n == 1 else f"mean ± standard deviation over {n} seeds"


def _best_first(settings: dict[str, list[Run]]) -> list[tuple[str, list[Run]]]:
    return sorted(settings.items(), key=lambda item: mean(item[1], "loss_after").mean)


def _measured(columns: dict[str, str], settings: dict[str, list[Run]]) -> dict[str, str]:
    runs = list(itertools.chain.from_iterable(settings.values()))
    return {name: title for name, title in columns.items() if any(name in run.measures for run in runs)}


def _learned_table(settings: dict[str, list[Run]], found: Verdict) -> Table:
    columns = _measured(LEARNED, settings)
    rows = []
    for label, runs in _best_first(settings):
        against = found.against.get(label)
        rows.append(
            [
                label,
                f"{len(runs)}",
                *(spread(mean(runs, name), 4) for name in ("loss_before", "loss_after")),
                "best" if label == found.best else interval(against) if against else "no common seed",
                spread(mean(runs, "perplexity_after"), 2),
                *(number(name, mean(runs, name)) for name in columns),
            ]
        )
    note = (
        "What was learned. Mean ± standard deviation over seeds, best first; losses are in nats a token. − best: the "
        "mean difference from the first row over the seeds that both have, with Student's 95 % interval; each row by "
        "itself, not corrected for how many there are."
    )
    header = ["setting", "seeds", "loss before", "loss after", "− best [95 %]", "perplexity", *columns.values()]
    return Table(header, rows, note)


def _cost_table(settings: dict[str, list[Run]]) -> Table:
    columns = _measured(COST, settings)
    rows = [[label, *(number(name, mean(runs, name)) for name in columns)] for label, runs in _best_first(settings)]
    note = "What it cost. Mean ± standard deviation over seeds, in the order of the table above."
    return Table(["setting", *columns.values()], rows, note)


def _differences_table(rows: list[tuple[str, str, str, Difference]]) -> Table:
    body = [[f"{b} − {a}", setting or "–", f"{d.n}", interval(d), f"{_lower(a, b, d)}"] for setting, a, b, d in rows]
    note = (
        "Paired differences of held-out loss between methods (nats a token): pairs of runs that share the seed and "
        "every other setting that both methods have; mean and Student's 95 % interval, each row by itself."
    )
    return Table(["methods", "setting", "pairs", "difference [95 %]", "lower loss"], body, note)


def _lower(a: str, b: str, d: Difference) -> str:
    if d.n < 2:
        return "one pair: unknown"
    return (b if d.mean < 0 else a) if d.certain else "not told apart"


def interval(d: Difference) -> str:
    return f"{d.mean:+.4f}" + (f" [{d.low:+.4f}, {d.high:+.4f}]" if d.n > 1 else " (one pair)")


def spread(m: Mean, digits: int) -> str:
    return f"{m.mean:.{digits}f}" + (f" ± {m.std:.{digits}f}" if m.std > 0 else "")  # NaN > 0 is false


def number(measure: str, m: Mean) -> str:
    """A mean with its unit, and the spread where there is one to show."""
    scale, unit, digits = {
        "token_accuracy_after": (100, " %", 1),
        "valid_after": (100, " %", 1),
        "train_seconds": (1, " s", 1),
        "total_seconds": (1, " s", 1),
        "peak_memory_bytes": (1e-9, " GB", 2),
        "trainable_params": (1, "", 0),
        "adapter_bytes": (1e-6, " MB", 2),
        "base_bytes": (1e-6, " MB", 1),
        "bits_per_weight": (1, "", 3),
        "exact_match_after": (100, " %", 1),
        "second_loss_rise": (1, "", 3),
        "effective_rank": (1, "", 1),
        "expert_imbalance": (1, "", 2),
        "experts_without_tokens": (1, "", 1),
        "cpu_energy_joules": (1e-3, " kJ", 2),
    }[measure]
    if not m.n:
        return "–"
    text = f"{m.mean * scale:,.{digits}f}"
    if m.std > 0:
        text += f" ± {m.std * scale:,.{digits}f}"
    return text + unit


def behind(picture: Picture) -> str:
    """The runs behind a picture, each by its directory and its hash, which ends the directory's name in a sweep."""
    return ", ".join(run.name if run.identity in run.name else f"{run.name} ({run.identity})" for run in picture.runs)


def markdown(parts: list[Section]) -> str:
    text = []
    for level, part in enumerate(parts):
        text += [f"{'#' if level == 0 else '##'} {part.title}", "\n".join(part.lines)]
        for table in part.tables:
            rows = [table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.rows]
            text += ["\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)]
            text += [table.note]
        for file, picture in part.pictures.items():
            text += [f"![{picture.name}]({file})", picture.caption]
            text += [f"<details><summary>The {len(picture.runs)} runs behind it</summary>{behind(picture)}</details>"]
    return "\n\n".join(block for block in text if block) + "\n"


def page(parts: list[Section], images: dict[str, bytes]) -> str:
    """One HTML page with the pictures inside it.

    Args:
        images: PNG by file name.
    """
    body = []
    for level, part in enumerate(parts):
        body.append(f"<h{min(level, 1) + 1}>{html.escape(part.title)}</h{min(level, 1) + 1}>")
        for in_list, lines in itertools.groupby(part.lines, key=lambda line: line.startswith("- ")):
            kind, marked = ("li" if in_list else "p"), [_inline(line.removeprefix("- ")) for line in lines]
            text = "".join(f"<{kind}>{line}</{kind}>" for line in marked)
            body.append(f"<ul>{text}</ul>" if in_list else text)
        for table in part.tables:
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
            rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
            body.append(f"<table><tr>{head}</tr>{rows}</table><p>{html.escape(table.note)}</p>")
        for file, picture in part.pictures.items():
            source = f"data:image/png;base64,{base64.b64encode(images[file]).decode()}"
            body.append(
                f'<figure><img src="{source}" alt="{html.escape(picture.caption)}"><figcaption>'
                f"{html.escape(picture.caption)}<details><summary>The {len(picture.runs)} runs behind it</summary>"
                f"{html.escape(behind(picture))}</details></figcaption></figure>"
            )
    title = html.escape(parts[0].title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _inline(text: str) -> str:
    """Escaped, with **bold** as such."""
    parts = html.escape(text).split("**")
    return "".join(f"<b>{part}</b>" if i % 2 else part for i, part in enumerate(parts))
