"""How the project is installed: names of packages, and the library from another folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from experiments.system.files import PROJECT_ROOT


def names(lines: list[str]) -> set[str]:
    return {re.split(r"[=<>#\s]", line)[0] for line in lines} - {""}


def test_what_pyproject_names_is_pinned_in_requirements():
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert len(named) == len(set(named))
    assert set(named) == names((PROJECT_ROOT / "requirements.txt").read_text().splitlines())


def elsewhere(folder: Path, code: str, *path: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def test_the_library_in_another_folder(tmp_path):
    """What `pip install -e .` puts on the path is .ci; the names of the folders are taken by `import qdora` alone."""
    find = "import importlib.util as u; print([s and s.origin for s in map(u.find_spec, ('kernels', 'modules'))])"
    assert elsewhere(tmp_path, find, PROJECT_ROOT / ".ci").stdout == "[None, None]\n"
    done = elsewhere(tmp_path, f"import qdora; {find}", PROJECT_ROOT / ".ci")
    assert done.stdout == f"{[str(PROJECT_ROOT / name / '__init__.py') for name in ('kernels', 'modules')]}\n"


def test_a_copy_and_another_kernels_are_refused(tmp_path):
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").touch()
    done = elsewhere(tmp_path, "import kernels, qdora", tmp_path / "other", PROJECT_ROOT / ".ci")
    assert "ImportError: a package `kernels` that is not qdora's is loaded: import qdora first" in done.stderr
    shutil.copytree(PROJECT_ROOT / ".ci" / "qdora", tmp_path / "copy" / "qdora")
    done = elsewhere(tmp_path, "import qdora", tmp_path / "copy")
    assert "ImportError: qdora works in its own folder: install it there with `pip install -e .`" in done.stderr
