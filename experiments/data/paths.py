"""The files that a path means.

A path is a file, a pattern such as "data/train-*.parquet", a folder of files, or a folder that `datasets` saved
(`save_to_disk`).
"""

import glob
import json
import os
import re
from pathlib import Path

from experiments.data.opened import kind_of
from experiments.errors import UserError

SPLITS = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")  # at the start of a file's name


def files_of(path: str, endings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The files that a path means, in the order of their names, and those of a folder that have no such ending.

    Raises:
        UserError: there are none, or it is not clear which are meant.
    """
    expanded = os.path.expanduser(path)
    if not os.path.isdir(expanded):
        found = sorted(glob.glob(expanded)) if glob.has_magic(expanded) and not os.path.exists(expanded) else [path]
        if not found:
            raise UserError(f"{path}: no file has such a name")
        return found, []
    found, others = _in_folder(Path(path), endings)
    if not found:
        raise UserError(f"{path}: no file to read in this folder: expected names that end in {', '.join(endings)}")
    splits = {match[1] for name in found if (match := SPLITS.match(Path(name).name))}
    if "train" in splits and len(splits) > 1:
        raise UserError(
            f"{path}: this folder has files of {', '.join(sorted(splits))}: choose one, such as "
            f"'data.path={path}/train*' with 'data.heldout_path={path}/{min(splits - {'train'})}*'"
        )
    return found, others


def _in_folder(folder: Path, endings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    inside = folder.expanduser()
    if (inside / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in inside.glob("*/state.json"))
        raise UserError(f"{folder} has the splits {', '.join(splits)}: choose one, such as data.path={folder}/train")
    if (inside / "state.json").is_file() and (inside / "dataset_info.json").is_file():
        return [str(folder / name) for name in _saved_files(folder)], []
    found, others = [], []
    for path in sorted(inside.iterdir()):
        if path.name.startswith("."):
            continue
        shown = folder / path.name
        if path.is_dir():
            deeper = _in_folder(shown, endings)
            found, others = found + deeper[0], others + deeper[1]
        else:
            (found if kind_of(path.name) in endings else others).append(str(shown))
    return found, others


def _saved_files(folder: Path) -> list[str]:
    """The Arrow files of a folder that `datasets` saved."""
    try:
        state = json.loads((folder.expanduser() / "state.json").read_text(encoding="utf-8"))
        names = [file["filename"] for file in state["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files of another directory")
        return names
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}/state.json is not as `datasets` saves it: save the data set again") from error
