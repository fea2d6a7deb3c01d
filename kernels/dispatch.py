"""Which implementation of an op runs: the torch twin or the Triton kernel.

CPU tensors run the torch twin, CUDA tensors the Triton kernel. For GPUs before sm_80 Triton 3.7 has no matrix
instructions: there ops with matrix products run the twin, whose products are the library's, and a warning says so.
`QDORA_BACKEND=torch|triton`, read once, or `use_backend(...)` overrides. With `TRITON_INTERPRET=1` in the environment
before triton is imported, the Triton implementation also runs on CPU tensors, in Triton's interpreter: slow, for proofs
only.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import torch

BACKENDS = ("torch", "triton")
_override: ContextVar[str | None] = ContextVar("qdora_backend", default=None)


def interpreting() -> bool:
    """True if `@triton.jit` functions run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on backend `name` ("torch" or "triton").

    Raises:
        ValueError: unknown name.
    """
    token = _override.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache  # reading the environment takes as long as a small tensor's sum
def _environment() -> str | None:
    env = os.environ.get("QDORA_BACKEND")
    return _checked(env, "QDORA_BACKEND") if env else None


@functools.cache
def _has_matrix_instructions(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, Triton has matrix instructions from sm_80 on: "
            "adapted linears and the DoRA norm run in torch; QDORA_BACKEND=triton runs their kernels all the same",
            stacklevel=2,
        )
    return major >= 8


def use_triton(tensor: torch.Tensor, products: bool = False) -> bool:
    """True if an op on `tensor` runs its Triton kernel.

    Args:
        products: the kernel multiplies matrices.

    Raises:
        RuntimeError: the Triton backend was asked for on a tensor it cannot run on.
    """
    backend = _override.get() or _environment()
    if backend is None:
        return tensor.is_cuda and (not products or _has_matrix_instructions(tensor.device))
    if backend == "triton" and not (tensor.is_cuda or interpreting()):
        raise RuntimeError(
            f"backend 'triton' was asked for on a {tensor.device.type} tensor: move it to a GPU, "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    return backend == "triton"
