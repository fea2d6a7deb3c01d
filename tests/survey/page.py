"""The page of the survey: experiments/ARCHITECTURES.md."""

import re
import textwrap
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def told(cells: dict[str, str], said: str) -> str:
    """The result of one architecture in one line: one word if all methods agree, and what is left out."""
    if not cells:
        return said
    outcomes = {*cells.values()}
    one = outcomes.pop() if len(outcomes) == 1 else "; ".join(f"{method} {text}" for method, text in cells.items())
    return f"{one}; left out: {left_out(said)}" if left_out(said) else one


def left_out(said: str) -> str:
    """The names in the lines that a run printed, without numbers and reasons: `router, experts`."""
    names = [re.sub(r" \(\d+\)|, [\d,]+ parameters", "", line.split(": ")[1]) for line in said.splitlines()]
    return ", ".join(names)


def page(found: dict[str, tuple[dict[str, str], str]], methods: list[str]) -> str:
    """Markdown: those that are right with every linear adapted in a paragraph, the others in a line each."""
    whole = [name for name, result in found.items() if told(*result) == "ok"]
    right = [name for name, (cells, _) in found.items() if {*cells.values()} == {"ok"} and name not in whole]
    built = [name for name, (cells, _) in found.items() if cells]
    wrong = [name for name in built if name not in whole + right]
    parts = [
        "# Architectures",
        _paragraph(
            "`python -m tests.survey to=experiments/ARCHITECTURES.md` wrote this page, with "
            f"{', '.join(f'{package} {version(package)}' for package in PACKAGES)}, on a CPU in fp32."
        ),
        _paragraph(
            f"Of {len(found)} architectures of `AutoModelForCausalLM` a small random model is trained for a step, "
            "saved, loaded, generates, and is exported dense and packed. Logits, gradients and tokens are those of "
            f"PEFT over transformers' own model, with each of {', '.join(f'`{method}`' for method in methods)}."
        ),
        _paragraph(f"**Right, with all linears** ({len(whole)}): {', '.join(whole)}."),
        f"**Right**, but for parts that stay dense and get no adapter ({len(right)}):",
        _table("left out", {name: left_out(found[name][1]) for name in right}),
        f"**Refused** in one line, at the stage that it names, and right up to there ({len(wrong)}):",
        _table("said", {name: told(*found[name]) for name in wrong}),
        f"**Not tried**: transformers did not build the small model ({len(found) - len(built)}):",
        _table("said", {name: told(*result) for name, result in found.items() if name not in built}),
    ]
    return "\n\n".join(parts) + "\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(heading: str, rows: dict[str, str]) -> str:
    return "\n".join([f"| architecture | {heading} |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows.items())])
