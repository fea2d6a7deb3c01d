"""The default data: Python functions with their authors' descriptions.

Pairs (a function's source without its docstring → the docstring's first paragraph on one line), read with `ast` from
the running interpreter's standard library. So the main job trains on real text with a real task, and needs neither a
download nor a licence. Reading takes some seconds; the pairs are kept in `.cache/` (or `$QDORA_CACHE`).
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.errors import UserError
from experiments.system.files import cache_dir, write_atomically
from modules.files.checked import read_checked, with_checksum

EXTRACTOR_VERSION = 1  # raise it when a change below changes the pairs: it is part of the cache's key

# Tests, other people's packages, generated tables and demos: not the library's own documented code.
SKIPPED_DIRS = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "distutils",  # gone in Python 3.12
    "ensurepip",
    "idle_test",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
MIN_WORDS, MAX_WORDS = 4, 60  # shorter says nothing the name does not say; longer is a manual page


@dataclass(frozen=True)
class Pair:
    """One function: where it is and the two texts.

    Attributes:
        module: path of its file relative to the standard library, with forward slashes.
        function: qualified name, as `Class.method`.
        source: dedented source, decorators included, without the docstring. Valid Python.
        summary: the docstring's first paragraph on one line.
    """

    module: str
    function: str
    source: str
    summary: str


def docstring_pairs(stdlib: Path | None = None) -> list[Pair]:
    """Every pair below `stdlib` (by default the running interpreter's), sorted by module, then as in the file.

    Raises:
        UserError: the cache folder cannot be written, or there is no source to read.
    """
    stdlib = Path(stdlib or sysconfig.get_path("stdlib")).resolve()
    key = hashlib.sha256(f"{EXTRACTOR_VERSION}\n{sys.version}\n{stdlib}".encode()).hexdigest()[:16]
    cache = cache_dir() / f"docstrings-{key}.json"
    pairs = _read_cache(cache)
    if pairs is None:
        pairs = extract_pairs(stdlib)
        write_atomically(cache, with_checksum(json.dumps([asdict(pair) for pair in pairs])))
    return pairs


def extract_pairs(stdlib: Path) -> list[Pair]:
    """Read the pairs from the Python files below `stdlib`, without the cache."""
    pairs: dict[str, Pair] = {}  # by summary: so no held-out answer is also a training answer
    for path in sorted(stdlib.rglob("*.py")):
        module = path.relative_to(stdlib)
        if SKIPPED_DIRS.isdisjoint(module.parts):
            for pair in _pairs_of_file(path, module.as_posix()):
                pairs.setdefault(pair.summary, pair)
    if not pairs:
        raise UserError(f"no documented functions in the Python files below {stdlib}: use data=jsonl data.path=FILE")
    return list(pairs.values())


def _pairs_of_file(path: Path, module: str) -> Iterator[Pair]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # templates and files in another encoding
        return
    lines = text.split("\n")  # not splitlines(): to Python a form feed ends no line
    for name, node in _functions(tree):
        summary = _summary(node)
        source = _source_without_docstring(node, lines) if summary else None
        if source:
            yield Pair(module, name, source, summary)


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods under `node` with their qualified names, in the file's order."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}" if prefix else child.name
            if not isinstance(child, ast.ClassDef):
                yield name, child
        yield from _functions(child, name)


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The docstring's first paragraph on one line; None if it is missing or not a sentence about the function."""
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    summary = " ".join(re.split(r"\n\s*\n", docstring, maxsplit=1)[0].split())
    # Not a name in lower case, "For example:", "…", a signature ("f(x) -> y") or a doctest.
    is_sentence = re.fullmatch(r"[A-Z].*[\w)'\"`]\.?", summary) and not re.search("->|>>>", summary)
    return summary if is_sentence and MIN_WORDS <= len(summary.split()) <= MAX_WORDS else None


def _source_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """The function's dedented source; None if its body is a stub or its docstring shares a line with code."""
    docstring, *body = node.body
    if all(isinstance(statement, ast.Pass | ast.Raise) for statement in body):
        return None
    own_line = lines[docstring.lineno - 1][: docstring.col_offset].isspace()
    if not own_line or body[0].lineno == docstring.end_lineno:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    before = lines[first - 1 : docstring.lineno - 1]
    after = lines[docstring.end_lineno : node.end_lineno]
    while not after[0].strip():
        del after[0]
    indent = lines[first - 1][
        : node.col_offset
    ]  # not textwrap.dedent: a string's lines may be indented less than the rest
    return "\n".join(line.removeprefix(indent) for line in before + after)


def _read_cache(cache: Path) -> list[Pair] | None:
    """The pairs in `cache`; None if it is absent or damaged, so that it is written again."""
    try:
        return [Pair(**fields) for fields in json.loads(read_checked(cache))] or None
    except (OSError, ValueError, TypeError):
        return None
