"""Fixtures of the kernel tests."""

import pytest
import torch

from kernels import use_backend
from kernels.op import interpreting
from tests.kernels.nf4_cases import triton_device


@pytest.fixture
def on_triton_device():
    """Makes the device that Triton kernels run on the default one."""
    with torch.device(triton_device()):
        yield


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Runs a test on the torch twin and on the Triton kernels; fresh memory holds NaN, so an element that a kernel
    forgets to write shows."""
    on_gpu = torch.cuda.is_available()
    if request.param == "triton" and not (on_gpu or interpreting()):
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if request.param == "triton" and not on_gpu and torch.bfloat16 in parameters.values():
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_device("cuda" if on_gpu else "cpu")
    with use_backend(request.param):
        yield request.param
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "cpu"])
def column(request):
    """Runs a test of an op without Triton kernels on its definition and on its CPU kernels."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def number_of_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
