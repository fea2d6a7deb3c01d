"""Every notebook runs from top to bottom, on its small path if it has one, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_A_CELL = 300


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """The name of a kernel that runs this very interpreter, whatever `python3` means in the user's own Jupyter."""
    write_kernel_spec(tmp_path / "kernels" / "this")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    return "this"


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_the_project_root(path, kernel, monkeypatch):
    monkeypatch.setenv("QDORA_SMALL", "1")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=SECONDS_A_CELL, kernel_name=kernel, resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), (
        f"{path.name} has outputs: clear them in Jupyter and save it"
    )
