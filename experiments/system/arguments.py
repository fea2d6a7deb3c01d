"""Answers that need no torch: `--help`, a key or a choice that does not exist, and the Tab key.

`answer` is called when `python -m experiments.…` starts, before the command is imported (experiments/__init__.py), and
again by the command itself, whoever calls it.
"""

import ast
import difflib
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.errors import UserError
from experiments.system import completion
from experiments.system.files import PROJECT_ROOT
from experiments.system.keys import Keys, keys_of, source_of

HELP = {"-h", "--help"}
PLAIN = re.compile(r"[\w.+-]+")  # a value that no grammar of Hydra's changes
BOOLS = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")  # that OmegaConf reads
NUMBERS: dict[str, tuple[Callable[[str], object], str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (lambda text: BOOLS.index(text.lower()), "true or false"),
}


def before_imports() -> None:
    """While `python -m experiments.…` begins: answer."""
    asked = [name for name in sys.orig_argv if name.startswith("experiments.")]
    if sys.argv[0] != "-m" or not asked or (file := source_of(asked[0])) is None:  # "-m" until the module is found
        return
    try:
        answer(file, sys.argv[1:])
    except UserError as error:  # torchrun starts several of these
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)


def answer(file: Path, arguments: Sequence[str]) -> None:
    """End the process after `--help` and the Tab key; check the arguments of a command that declares its keys.

    A command with options of its own, such as --to, has them in arguments.py beside it, in a function of its name.

    Args:
        file: the command's source.

    Raises:
        UserError: see `check_keys`.
    """
    if (options := file.with_name("arguments.py")).is_file() and options.parent.name != "system":
        name = ".".join(options.relative_to(PROJECT_ROOT).with_suffix("").parts)
        getattr(importlib.import_module(name), file.parent.name if file.stem == "__main__" else file.stem)(arguments)
        return
    keys = keys_of(file)
    if HELP & set(arguments):
        print(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))
        if keys is not None and keys.hydra:
            print(f"\n{describe(keys)}")
        sys.exit(0)
    if keys is None:
        return
    if {"-sc", "--shell-completion"} & set(arguments):
        sys.exit(completion.answer(keys, arguments[-1]))
    check_keys(keys, arguments)


def check_keys(keys: Keys, arguments: Sequence[str]) -> None:
    """Refuse a key or a choice that does not exist.

    Raises:
        UserError: the message says which one was meant.
    """
    for argument in arguments:
        sign, key, value = re.fullmatch(r"([+~]*)([^=]*)(?:=(.*))?", argument, re.DOTALL).groups()
        if argument.startswith("-") or value is None or key.startswith(("hydra.", "hydra/")) or key in keys.more:
            continue
        group = key.partition(":")[0]
        if group in keys.groups:
            _check_choice(keys, sign, group, value)
        elif key in keys.keys:
            _check_value(key, keys.keys[key].type, value)
        elif not _inside(keys, key):
            raise UserError(f"no such key: {key}; {_meant(key, keys)}")


def _check_choice(keys: Keys, sign: str, group: str, value: str) -> None:
    for one in value.split(","):
        if PLAIN.fullmatch(one) and one not in keys.groups[group] and one != "null":
            raise UserError(f"{sign}{group}={value}: no such {group}; {_alike(one, keys.groups[group])}")
    if group not in keys.chosen and not sign:
        raise UserError(f"{group}={value}: give it with a plus, +{group}={value}")


def _check_value(key: str, kind: str, value: str) -> None:
    read, words = NUMBERS.get(kind.removesuffix(" | None"), (str, ""))
    for one in value.split(","):
        if PLAIN.fullmatch(one) and not (one == "null" and kind.endswith("None")):
            try:
                read(one)
            except ValueError as error:
                raise UserError(f"{key}={value}: choose {words}") from error


def _inside(keys: Keys, key: str) -> bool:
    """Whether the key is of a mapping, as in `rank_pattern.q_proj`, or a part of the configuration as a whole."""
    parts = key.split(".")
    outer = (".".join(parts[:n]) for n in range(1, len(parts)))
    return any(keys.keys[name].type.startswith(("Any", "dict")) for name in outer if name in keys.keys) or any(
        name.startswith(f"{key}.") for name in keys.keys
    )


def _meant(key: str, keys: Keys) -> str:
    """The keys that look like it, or have its name elsewhere: `steps` is `trainer.steps`."""
    names = [*keys.keys, *keys.groups, *keys.more]
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = difflib.get_close_matches(key, names, n=2, cutoff=0.7)
    close += [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.7)]
    found = list(dict.fromkeys(close))[:2]
    return f"did you mean {' or '.join(found)}?" if found else "--help lists them"


def _alike(value: str, there: list[str]) -> str:
    meant = "".join(f"did you mean {close}? " for close in difflib.get_close_matches(value, there, n=1))
    return f"{meant}there are {', '.join(there)}"


def describe(keys: Keys) -> str:
    """The keys for a reader: a line each, with the value that it has unless it is set."""
    lines = ["Keys, as key=value, and the values that they have unless they are set:", ""]
    for group, choices in keys.groups.items():
        plus = "" if group in keys.chosen else "+"
        has = f" ({keys.chosen[group]})" if keys.chosen.get(group) else ""
        lines += _entry(f"{plus}{group}={has}", ", ".join(choices))
    for key in keys.keys.values():
        lines += _entry(f"{key.name}={'' if key.default is None else key.default}", key.meaning)
    return "\n".join(lines)


def _entry(name: str, meaning: str) -> list[str]:
    first = [f"  {name}"] if len(name) > 32 else []
    start = f"  {'' if first else name:<34}"
    wrapped = textwrap.wrap(meaning, 120, initial_indent=start, subsequent_indent=" " * 36)
    return first + (wrapped or [start.rstrip()] * (not first))
