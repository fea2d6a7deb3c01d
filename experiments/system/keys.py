"""The keys of a command: names, types, values and meaning, read from the source of its schema and from conf/.

Nothing is imported for it, so that a typo, `--help` and the Tab key are answered before torch is loaded.

A command names its schema, a dataclass, in a call of `hydra_command`, `takes_keys` or `read_options` (cli.py). The
meaning of a field is the comment beside or above it, or its entry under `Attributes:` in the docstring.
"""

import ast
import functools
import io
import re
import tokenize
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from experiments.system.files import PROJECT_ROOT

CONF = PROJECT_ROOT / "conf"
NAMES_SCHEMA = ("hydra_command", "takes_keys", "read_options")  # they are called with a command's schema


@dataclass(frozen=True)
class Key:
    """A key: its full name, its type as the source has it, and the value that it has unless it is set."""

    name: str
    type: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Keys:
    """What a command takes.

    Attributes:
        keys: by full name.
        groups: the choices of each group of conf/, such as `model` and `data@second`.
        chosen: the groups that need no plus, and the choice of each unless it is set.
        more: keys that the command reads itself.
        hydra: whether conf/ has a file of the command; the docstrings of the others list their keys.
    """

    keys: dict[str, Key]
    groups: dict[str, list[str]]
    chosen: dict[str, str | None]
    more: tuple[str, ...] = ()
    hydra: bool = True


def source_of(module: str) -> Path | None:
    """The file of a module of this project, or of a package's `__main__`; None: there is none."""
    path = PROJECT_ROOT.joinpath(*module.split("."))
    return next((file for file in (path / "__main__.py", path.with_suffix(".py")) if file.is_file()), None)


@functools.cache
def keys_of(file: Path) -> Keys | None:
    """The keys of the command in `file`; None: it declares none."""
    for call in ast.walk(_parsed(file)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in NAMES_SCHEMA:
            [schema] = [a.id for a in call.args if isinstance(a, ast.Name) and a.id[0].isupper()]
            values = [*call.args, *(keyword.value for keyword in call.keywords)]
            more = tuple(e.value for value in values if isinstance(value, ast.Tuple) for e in value.elts)
            if call.func.id == "read_options":
                return _options(file, schema, more)
            return _configuration(file, schema, next(v.value for v in values if isinstance(v, ast.Constant)), more)
    return None


def _options(file: Path, schema: str, changes: tuple[str, ...]) -> Keys:
    """Those of `schema`, and those of a run that begin with one of `changes`."""
    keys = {key.name: key for key in fields(file, schema)}
    keys |= {key.name: key for key in fields(source_of("experiments.config"), "Config") if key.name.startswith(changes)}
    groups = [change.removesuffix("=") for change in changes if change.endswith("=")]
    return Keys(keys, {group: choices(group) for group in groups}, dict.fromkeys(groups), hydra=False)


def _configuration(file: Path, schema: str, config_name: str, more: tuple[str, ...]) -> Keys:
    """Those of `schema`, and the groups of conf/<config_name>.yaml."""
    keys = {key.name: key for key in fields(file, schema)}
    config = _yaml(CONF / f"{config_name}.yaml")
    chosen = {name: option for entry in config["defaults"] if isinstance(entry, dict) for name, option in entry.items()}
    chosen = {name: option for name, option in chosen.items() if not name.startswith("override")}
    for group, option in chosen.items():
        if option is not None:
            path = group.partition("@")[2] or group
            keys = _with_values(keys, _yaml(CONF / group.partition("@")[0] / f"{option}.yaml"), f"{path}.")
    keys = _with_values(keys, config, "")
    groups = {name: choices(name) for name in chosen}
    if "method" in {name.partition(".")[0] for name in keys}:
        groups["method"] = choices("method")
    return Keys(keys, groups, chosen, more)


def choices(group: str) -> list[str]:
    """The files of a group of conf/."""
    return sorted(path.stem for path in (CONF / group.partition("@")[0]).glob("*.yaml"))


def fields(file: Path, name: str, prefix: str = "") -> list[Key]:
    """The keys of the dataclass `name` that `file` defines or imports, those of its bases and of its parts included."""
    file, node = _class(file, name)
    found = {key.name: key for base in node.bases for key in fields(file, base.id, prefix)}
    comments, documented = _comments(file), _attributes(ast.get_docstring(node) or "")
    for field in node.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        key, kind = field.target.id, ast.unparse(field.annotation)
        if kind.isidentifier() and kind[0].isupper() and kind != "Any":  # a part with keys of its own
            found |= {part.name: part for part in fields(file, kind, f"{prefix}{key}.")}
            continue
        default = None if field.value is None else ast.unparse(field.value)
        beside = comments.get(field.end_lineno, (False, ""))[1] or _above(comments, field.lineno)
        unset = {"MISSING": None, "field(default_factory=list)": "[]", "ALL_LINEAR": "all-linear"}
        default = unset.get(default, None if default is None else _shown(default.strip("'")))
        found[prefix + key] = Key(prefix + key, kind, default, beside or documented.get(key, ""))
    return list(found.values())


@functools.cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _class(file: Path, name: str) -> tuple[Path, ast.ClassDef]:
    """The class and the file that defines it."""
    for node in _parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return file, node
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _class(source_of(node.module), name)
    raise LookupError(f"{file}: no class {name}")


@functools.cache
def _comments(file: Path) -> dict[int, tuple[bool, str]]:
    """By line the comment, and whether it has the line to itself."""
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    comments = (token for token in tokens if token.type == tokenize.COMMENT)
    return {t.start[0]: (t.line.lstrip().startswith("#"), t.string.lstrip("# ").strip()) for t in comments}


def _above(comments: dict[int, tuple[bool, str]], line: int) -> str:
    """The comment that ends above the line."""
    lines = []
    while comments.get(line := line - 1, (False, ""))[0]:
        lines.insert(0, comments[line][1])
    return " ".join(lines)


def _attributes(docstring: str) -> dict[str, str]:
    """The meaning of each attribute; one entry may have several names."""
    entries = re.findall(r"^    ([\w, ]+): (.+(?:\n     .*)*)", docstring.partition("Attributes:\n")[2], re.MULTILINE)
    return {name: " ".join(meaning.split()) for names, meaning in entries for name in names.split(", ")}


def _yaml(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _with_values(keys: dict[str, Key], values: dict, prefix: str) -> dict[str, Key]:
    """The keys with the values of a file of conf/, which are under `prefix`."""
    for name, value in values.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in keys:
            keys = _with_values(keys, value, f"{prefix}{name}.")
        elif prefix + name in keys:
            keys = keys | {prefix + name: replace(keys[prefix + name], default=_shown(value))}
    return keys


def _shown(value: object) -> str:
    """A value as the command line has it."""
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
