"""The runs that the notebooks on ablations read: a sweep that `make sweeps` left in notebooks/results/.

With QDORA_SMALL=1 in the environment short runs of the tiny model take their place, made on the spot: they show that a
notebook works, and say nothing about models.
"""

import contextlib
import io
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.config import resolve
from experiments.errors import UserError
from experiments.runs.groups import Group, group, read_runs
from experiments.runs.one_run import run
from experiments.system.cli import composed
from experiments.system.files import PROJECT_ROOT

RESULTS = PROJECT_ROOT / "notebooks" / "results"
SHORT = (
    *("model=tiny", "rank=4", "trainer=debug", "trainer.steps=2", "trainer.eval_every=1", "trainer.batch_size=2"),
    *("trainer.samples=0", "trainer.threads=1", "data.max_train=8", "data.max_heldout=2"),
)


def load(name: str, small: dict[str, Sequence]) -> Group:
    """The runs of the sweep and data `name`, such as "rank-docstrings".

    Args:
        small: the small path runs each combination of these values, {"+method": ["lora"], "seed": [0, 1]}.

    Raises:
        UserError: no results, or some that cannot be compared.
    """
    folder = RESULTS / name
    if os.environ.get("QDORA_SMALL") == "1":
        with tempfile.TemporaryDirectory() as made:
            _make(Path(made), small)
            runs, problems = read_runs(Path(made))
    else:
        runs, problems = read_runs(folder)
    for problem in problems:
        print(f"note: {problem}")
    groups = group(runs)
    if not groups:
        how = f"`make sweep-{name}` makes them in hours; QDORA_SMALL=1 in the environment gives a stand-in"
        raise UserError(f"{folder}: no results; {how}")
    if len(groups) > 1:
        raise UserError(f"{name}: results that cannot be compared: {'; '.join(one.title for one in groups)}")
    return groups[0]


def _make(folder: Path, values: dict[str, Sequence]) -> None:
    for combination in itertools.product(*values.values()):
        overrides = [f"{key}={value}" for key, value in zip(values, combination)]
        directory = folder / ",".join(overrides).replace("+", "")
        cfg = resolve(composed(*SHORT, *overrides, f"output_dir='{directory}'"))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(cfg)
