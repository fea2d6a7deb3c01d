"""Guard bands around every buffer of every kernel: no byte outside may change.

    python -m pytest -p tests.torture.guarded tests/kernels        the tests of the kernels, with guard bands

Both columns of kernels start at one seam. There each storage that a kernel gets lies in the middle of a larger buffer
while it runs. With a GPU `compute-sanitizer python -m pytest tests/kernels` asks the same of the hardware.
"""

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():  # as tests/conftest.py, which comes after this
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import triton
from kernels.cpu import numba_tools
from kernels.triton import launch as seam

GUARD, BYTE = 4096, 0xA5
launches = 0


class _Buffers:
    """Copies of the storages of tensors between guard bands."""

    def __init__(self):
        self.held: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def of(self, value: Any) -> Any:
        """A tensor over the copy of its storage; anything else as it is."""
        if not isinstance(value, Tensor) or value.is_meta or not value.untyped_storage().nbytes():
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.held:
            n_bytes = storage.nbytes()
            buffer = torch.full((n_bytes + 2 * GUARD,), BYTE, dtype=torch.uint8, device=value.device)
            buffer[GUARD : GUARD + n_bytes].copy_(_bytes(storage, value.device))
            self.held[storage.data_ptr()] = storage, buffer
        _, buffer = self.held[storage.data_ptr()]
        first = GUARD + value.storage_offset() * value.element_size()
        whole = torch.empty(0, dtype=value.dtype, device=value.device)
        offset = first // value.element_size()
        return whole.set_(buffer.untyped_storage(), offset, value.shape, value.stride())

    def settle(self, name: str) -> None:
        """Give the storages what the kernel wrote; raise AssertionError if it wrote beside them."""
        for storage, buffer in self.held.values():
            n_bytes = storage.nbytes()
            assert (buffer[:GUARD] == BYTE).all(), f"{name} wrote before a buffer"
            assert (buffer[GUARD + n_bytes :] == BYTE).all(), f"{name} wrote after a buffer"
            _bytes(storage, buffer.device).copy_(buffer[GUARD : GUARD + n_bytes])


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


@contextlib.contextmanager
def guards() -> Iterator[None]:
    """Inside, every kernel runs between guard bands. AssertionError: one wrote there."""
    launch, call = seam.launch, numba_tools.Kernel.__call__

    def guarded_launch(kernel, grid, *args, **more) -> None:
        global launches
        if 0 in grid or seam._recorded is not None:
            return launch(kernel, grid, *args, **more)
        launches, buffers = launches + 1, _Buffers()
        with torch.no_grad():
            launch(kernel, grid, *map(buffers.of, args), **{key: buffers.of(value) for key, value in more.items()})
            buffers.settle(getattr(kernel, "__name__", str(kernel)))

    def guarded_call(self, *arguments) -> None:
        global launches
        if arguments[0].is_meta:
            return
        launches, buffers = launches + 1, _Buffers()
        with torch.no_grad():
            call(self, *map(buffers.of, arguments))
            buffers.settle(self._code.native_name)

    modules = [
        importlib.import_module(f"kernels.triton.{found.name}") for found in pkgutil.iter_modules(triton.__path__)
    ]
    users = [module for module in modules if getattr(module, "launch", None) is launch]
    for module in users:
        module.launch = guarded_launch
    numba_tools.Kernel.__call__ = guarded_call
    try:
        yield
    finally:
        for module in users:
            module.launch = launch
        numba_tools.Kernel.__call__ = call


def pytest_configure(config) -> None:
    config.guards = guards()
    config.guards.__enter__()


def pytest_unconfigure(config) -> None:
    config.guards.__exit__(None, None, None)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"{launches} kernels ran between guard bands")
