"""Compare the results in a folder.

    python -m experiments.report [DIR] [--to COPY]

Reads every result.json under DIR (outputs/ unless given) and writes to DIR/report/

    report.html     all of it in one file: conclusions, tables, pictures
    report.md       the same, with the pictures beside it as PNG
    runs.csv        a row a run: its configuration and every number that it measured

On the folder of a study (experiments/study.py) the report answers its questions.

With --to the report is on COPY, a folder of the results without weights: small enough to be committed or sent.
"""

import io
import sys
from pathlib import Path

from experiments.errors import UserError
from experiments.report import arguments, page, study
from experiments.report.plots import pictures
from experiments.runs.groups import copy_runs, group, read_runs
from experiments.system.cli import command
from experiments.system.files import RESULT, STUDY, writable_dir, write_atomically

DPI = 120


def report(folder: Path, copy: Path | None = None) -> tuple[Path, int, list[str]]:
    """Write the report on `folder`; returns its directory, the number of runs, and a line for each file left out.

    Args:
        copy: a folder for the results without weights, which gets the report.

    Raises:
        UserError: there is no result that can be read, or `copy` has other things in it.
    """
    runs, problems = read_runs(folder)
    if not runs:
        hint = "; ".join(problems) or f"no {RESULT} in it or below; a run of `python -m experiments.run` writes one"
        raise UserError(f"{folder}: no results: {hint}")
    groups, of_study = group(runs), (folder / STUDY).exists()
    if copy is not None:
        copy_runs(groups, folder, copy, of_study)
        if of_study:
            write_atomically(copy / STUDY, (folder / STUDY).read_text(encoding="utf-8"))
        folder = copy
    directory = writable_dir(folder / "report", "copy the results to a folder")
    if of_study:
        parts = study.sections(folder)
    else:
        parts = page.sections(folder.name or str(folder), groups, problems, [pictures(one) for one in groups])
    images = {file: _png(picture.figure) for part in parts for file, picture in part.pictures.items()}
    for file, image in images.items():
        write_atomically(directory / file, image)
    write_atomically(directory / "runs.csv", page.as_csv(groups))
    write_atomically(directory / "report.md", page.markdown(parts))
    write_atomically(directory / "report.html", page.page(parts, images))
    return directory, len(runs), problems


def _png(figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, dpi=DPI, format="png")
    return image.getvalue()


@command
def main() -> None:
    options = arguments.report(sys.argv[1:])
    directory, count, problems = report(options.folder, options.to)
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    print(f"{count} runs compared; open {directory / 'report.html'}")


if __name__ == "__main__":
    main()
