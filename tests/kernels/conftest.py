"""Fixtures of the kernel tests."""

from pathlib import Path

import pytest
import torch

from kernels import columns, cpu, use_backend
from tests.kernels.nf4_cases import triton_device

KERNELS = Path(columns.__file__).parent


def op_file(path: Path) -> str | None:
    """The op file that a test file is about: "nf4" of test_nf4.py; None if it is not named after one."""
    file = path.stem.removeprefix("test_")
    return file if (KERNELS / "reference" / f"{file}.py").exists() else None


def pytest_generate_tests(metafunc):
    """`backend` is each column of the grid that has the op file under test; each column if there is no such file."""
    if "backend" in metafunc.fixturenames:
        file = op_file(metafunc.definition.path)
        names = [name for name in columns.BACKENDS if file is None or (KERNELS / name / f"{file}.py").exists()]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def on_triton_device():
    """Makes the device that Triton kernels run on the default one."""
    with torch.device(triton_device()):
        yield


@pytest.fixture
def backend(request, monkeypatch):
    """Runs a test on one column of the grid, with that column's device as the default one.

    A test is skipped where an op of the file under test would run its reference in place of the column's kernel: that
    proves nothing about the column. Fresh memory holds NaN, so an element that a kernel forgets to write shows.
    """
    on_gpu = torch.cuda.is_available()
    if request.param == "triton" and not (on_gpu or columns.interpreting()):
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if request.param == "triton" and not on_gpu and torch.bfloat16 in parameters.values():
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    if request.param == "cpu" and not cpu.available():
        pytest.skip("the CPU kernels cannot run here")
    file, column = op_file(request.path), columns.Row.column

    def column_or_skip(self, *args):
        chosen = column(self, *args)
        if self.file == file and chosen == "reference" != columns._override.get():
            pytest.skip(f"{self.name} has no {request.param} kernel for these tensors")
        return chosen

    monkeypatch.setattr(columns.Row, "column", column_or_skip)
    monkeypatch.setattr(columns, "_warn_of_reference", lambda *_: None)  # of the ops that only prepare a test
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_device("cuda" if on_gpu and request.param != "cpu" else "cpu")
    with use_backend(request.param):
        yield request.param
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def number_of_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
