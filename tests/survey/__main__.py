"""Every architecture of causal language models that transformers has, with LoRA, QLoRA, DoRA and QDoRA: what works?

    python -m tests.survey                                      all of them: an hour or two on two cores
    python -m tests.survey llama qwen3_moe methods=lora,qdora   some of them
    python -m tests.survey to=experiments/ARCHITECTURES.md      and write the page, in Markdown

A small random model of each is saved by transformers. It is trained for a step, saved, loaded, generates and is
exported, beside PEFT over transformers' own model: the same logits, gradients and tokens. "ok" means all of that.
Exit code 1: something differs, or ends in a traceback. A refusal in one line is none of the two.
"""

import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from transformers.utils import logging

from tests.survey.life import METHODS, STAGES, live, save_small, silent
from tests.survey.page import NOT_BUILT, page, told
from tests.survey.small import MODEL_TYPES


def cell(found: dict[str, str]) -> str:
    """One word for all stages, or what is wrong."""
    if wrong := [f"{stage} {found[stage]}" for stage in STAGES if found.get(stage, "ok") != "ok"]:
        return "WRONG: " + ", ".join(wrong)
    return "ok" if "refused" not in found else f"refused: {found['refused']}"


def survey(model_type: str, methods: list[str], folder: Path) -> tuple[dict[str, str], str]:
    """The cell of each method, and the lines that say what is left out; of a model that is not built why."""
    try:
        with silent():
            directory = save_small(model_type, folder)
    except Exception as error:  # of transformers: this tells which architectures the survey does not cover
        return {}, f"{NOT_BUILT}{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    cells, said = {}, ""
    for method in methods:
        try:
            found = live(directory, method, folder / method)
            cells[method], said = cell(found).replace(f"{folder}/", ""), found.get("said") or said
        except Exception as error:  # the survey goes on, and fails at the end
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__} {' '.join(str(error).split())[:150]}"
            cells[method] = f"TRACEBACK: {told} ({Path(where.filename).name}:{where.lineno})"
    return cells, said


def main() -> int:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    methods = given["methods"].split(",") if "methods" in given else list(METHODS)
    model_types = [argument for argument in sys.argv[1:] if "=" not in argument] or list(MODEL_TYPES)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lines: dict[str, str] = {}
    bad = 0
    for model_type in model_types:
        folder = Path(tempfile.mkdtemp())
        cells, said = survey(model_type, methods, folder)
        shutil.rmtree(folder)
        lines[model_type] = told(cells, said)
        print(f"{model_type}: {lines[model_type]}", flush=True)
        bad += any(cell.startswith(("WRONG", "TRACEBACK")) for cell in cells.values())
    if "to" in given:
        Path(given["to"]).write_text(page(lines, methods), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
