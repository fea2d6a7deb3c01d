"""Who may import whom, and that nobody does so in a circle. An import inside a function counts as well."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "modules", "experiments")  # each may import from those before it; notebooks/ is above them all
LIBRARIES = (
    "errors",
    "config",
    "system",
    "data",
    "training",
    "blocks",
    "models",
    "runs",
    "studies",
)  # likewise; then commands
COLUMNS = {"reference", "triton", "cpu"}  # of kernels/: only kernels/columns.py imports from them


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules of this project that the file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {inside[name] if inside[name] in MODULES else node.module for name in inside}
    return found & MODULES.keys()


def is_allowed(importer: str, imported: str) -> bool:
    (floor, *inside), (other_floor, *other_inside) = importer.split("."), imported.split(".")
    if floor != other_floor:
        return FLOORS.index(floor) > FLOORS.index(other_floor)
    if not inside or not other_inside or inside[0] == other_inside[0]:
        return True
    if floor == "experiments":  # a command may import every library, and no other command
        below = LIBRARIES[: LIBRARIES.index(inside[0])] if inside[0] in LIBRARIES else LIBRARIES
        return other_inside[0] in below
    if floor == "kernels" and other_inside[0] in COLUMNS:
        # aot/ and bench/ may look into them
        return inside[0] not in COLUMNS and (len(inside) > 1 or inside[0] == "columns")
    return True


def test_imports_keep_to_the_order_of_the_floors():
    wrong = [(name, other) for name, path in MODULES.items() for other in imports(path) if not is_allowed(name, other)]
    assert not wrong


def test_no_circle_of_imports():
    graphlib.TopologicalSorter({name: imports(path) - {name} for name, path in MODULES.items()}).prepare()
