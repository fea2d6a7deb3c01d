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
from tests.survey.page import page, told
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
        return {}, f"not built: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
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
    found: dict[str, tuple[dict[str, str], str]] = {}
    for model_type in model_types:
        folder = Path(tempfile.mkdtemp())
        found[model_type] = survey(model_type, methods, folder)
        shutil.rmtree(folder)
        print(f"{model_type}: {told(*found[model_type])}", flush=True)
    if "to" in given:
        Path(given["to"]).write_text(page(found, methods), encoding="utf-8")
    cells = [cell for cells, _ in found.values() for cell in cells.values()]
    return 1 if any(cell.startswith(("WRONG", "TRACEBACK")) for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
