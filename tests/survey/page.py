"""The page of the survey: experiments/ARCHITECTURES.md."""

import re
import textwrap
from importlib.metadata import version

LEFT_OUT, NOT_BUILT = "; left out: ", "not built: "
OK_BUT = f"ok{LEFT_OUT}"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def told(cells: dict[str, str], said: str) -> str:
    """The result of one architecture in one line: one word if all methods agree, and what is left out."""
    if not cells:
        return said
    outcomes = {*cells.values()}
    one = outcomes.pop() if len(outcomes) == 1 else "; ".join(f"{method} {text}" for method, text in cells.items())
    return f"{one}{LEFT_OUT}{left_out(said)}" if left_out(said) else one


def left_out(said: str) -> str:
    """The names in the lines that a run printed, without numbers and reasons: `router, experts`."""
    names = [re.sub(r" \(\d+\)|, [\d,]+ parameters", "", line.split(": ")[1]) for line in said.splitlines()]
    return ", ".join(names)


def page(lines: dict[str, str], methods: list[str]) -> str:
    """Markdown, of the line of each architecture: those that are right are named, the others keep their line."""
    whole = [name for name, line in lines.items() if line == "ok"]
    right = {name: line.removeprefix(OK_BUT) for name, line in lines.items() if line.startswith(OK_BUT)}
    unbuilt = {name: line.removeprefix(NOT_BUILT) for name, line in lines.items() if line.startswith(NOT_BUILT)}
    refused = {name: line for name, line in lines.items() if line.startswith("refused")}
    wrong = {name: line for name, line in lines.items() if name not in {*whole, *right, *unbuilt, *refused}}
    parts = [
        "# Architectures",
        _paragraph(
            "`python -m tests.survey to=experiments/ARCHITECTURES.md` writes this page. This one is of "
            f"{', '.join(f'{package} {version(package)}' for package in PACKAGES)}, on a CPU in fp32."
        ),
        _paragraph(
            f"Of {len(lines)} architectures of `AutoModelForCausalLM` a small random model is trained for a step, "
            "saved, loaded, generates, and is exported dense and packed. Logits, gradients and tokens are those of "
            "PEFT over transformers' own model, with each of "
            f"{', '.join(f'`{method}`' for method in methods)}; of DoRA on experts, which PEFT lacks, those of the "
            "formula. Models with experts are exported dense alone, for bitsandbytes packs none."
        ),
        _paragraph(f"**Right, with all linears** ({len(whole)}): {', '.join(whole)}."),
        f"**Right**, but for parts that stay dense and get no adapter ({len(right)}):",
        _table("left out", right),
        f"**Refused** in one line, at the stage that it names, and right up to there ({len(refused)}):",
        _table("said", refused),
        f"**Wrong** ({len(wrong)}):",
        _table("found", wrong),
        f"**Not tried**: transformers did not build the small model ({len(unbuilt)}):",
        _table("said", unbuilt),
    ]
    return "\n\n".join(parts) + "\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(heading: str, rows: dict[str, str]) -> str:
    return "\n".join([f"| architecture | {heading} |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows.items())])
