"""For the tests of NF4 and double quantization: inputs, bitsandbytes as the oracle, exact comparison."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from kernels import QuantState, use_backend
from kernels.op import interpreting

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ("normal", "zeros", "infinite", "nan")

needs_triton = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="no GPU, and TRITON_INTERPRET is not 1"
)


def only_supported(op, column: str, inputs: Iterable, *more) -> list:
    """Those of `inputs` for which `column` itself computes op(input, *more). Skips the test if there are none."""
    if column == "triton":
        return list(inputs)
    with use_backend(column), warnings.catch_warnings(action="ignore"):
        found = [one for one in inputs if op.column(one, *more) == column]
    return found or pytest.skip(f"{op.name} has no {column} kernel for these tensors")


def triton_device() -> str:
    """Where Triton kernels run: on the GPU if there is one, else in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def skip_bf16_in_interpreter(*dtypes: torch.dtype) -> None:
    if torch.bfloat16 in dtypes and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter computes bf16 wrongly")


def weights(n: int, kind: str = "normal", dtype: torch.dtype = torch.float32, blocksize: int = 64) -> Tensor:
    """n values on the CPU: normal with a scale that varies by block, and with special values by `kind`."""
    generator = torch.Generator().manual_seed(n + blocksize)
    w = torch.randn(n, generator=generator, device="cpu")
    w *= 1.7 ** (torch.arange(n, device="cpu") // blocksize % 7 - 3)
    if kind == "zeros":  # the first blocks and the end of the last one
        w[: 2 * blocksize] = 0
        w[-(n % blocksize + 5) :] = 0
    if kind == "infinite":
        w[n // 2 :: 3 * blocksize + 1] = torch.inf
        w[-1:] = -torch.inf
    if kind == "nan":
        w[n // 2 :: 3 * blocksize + 1] = torch.nan
        w[n // 3 :: 2 * blocksize + 1] = torch.inf
        w[-1:] = torch.nan
    return w.to(dtype)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal dtype, shape and bytes. A NaN equals any NaN; -0 and 0 are different."""
    got, want = got.detach().cpu(), want.detach().cpu()
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if not got.is_floating_point():
        return torch.equal(got, want)
    nan = got.isnan()
    return torch.equal(nan, want.isnan()) and torch.equal(
        got[~nan].contiguous().view(torch.uint8), want[~nan].contiguous().view(torch.uint8)
    )


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    if not same(got, want):
        pytest.fail(f"{what} differs: {difference(got, want)}")


def difference(got: Tensor, want: Tensor) -> str:
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    got, want = got.detach().cpu().view(-1), want.detach().cpu().view(-1)
    wrong = (got != want) & ~(got.isnan() & want.isnan())
    at = wrong.nonzero().view(-1)[:3].tolist()
    return f"{int(wrong.sum())} of {len(got)}, at {at}: {got[at].tolist()}, expected {want[at].tolist()}"


def bnb_quantize(w: Tensor, blocksize: int, double_quant: bool, quant_type: str = "nf4"):
    packed, state = bnb.quantize_4bit(w, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type)
    return packed.view(-1), state


def bnb_dequantize(packed: Tensor, state, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' answer; it compiles its code for odd lengths, which would take a minute a length."""
    state.dtype = dtype
    with torch.compiler.set_stance("force_eager"):
        return bnb.dequantize_4bit(packed.view(-1, 1), state).reshape(-1)


@contextlib.contextmanager
def guarded_memory(monkeypatch):
    """Inside, `torch.empty` gives memory full of 0xFF in the middle of a larger buffer; on leaving, the bytes around
    it must still be 0xFF: a kernel that forgets an element or writes beside its output shows."""
    guard, buffers, unguarded = 4096, [], torch.empty

    def empty(*size, dtype=torch.float32, device=None, **more):
        if device == "meta":  # a kernel file that is imported now makes its cases
            return unguarded(*size, dtype=dtype, device=device, **more)
        shape = size[0] if size and not isinstance(size[0], int) else size
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((n_bytes + 2 * guard,), 0xFF, dtype=torch.uint8, device=device)
        buffers.append((buffer, n_bytes))
        return buffer[guard : guard + n_bytes].view(dtype).view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    assert buffers, "nothing was allocated with torch.empty"
    for buffer, n_bytes in buffers:
        assert (buffer[:guard] == 0xFF).all(), "wrote before an output"
        assert (buffer[guard + n_bytes :] == 0xFF).all(), "wrote after an output"


def embedded(tensor: Tensor, before: int) -> Tensor:
    """The same numbers inside a larger buffer of 0xFF bytes, `before` elements from its start."""
    buffer = torch.full(((tensor.numel() + before + 512) * tensor.itemsize,), 0xFF, dtype=torch.uint8)
    buffer = buffer.to(tensor.device).view(tensor.dtype)
    buffer[before : before + tensor.numel()] = tensor.reshape(-1)
    return buffer[before : before + tensor.numel()].view(tensor.shape)


def each_tensor(state: QuantState, change: Callable[[Tensor], Tensor]) -> QuantState:
    """`state` with its tensors changed."""
    names = ("absmax", "nested_absmax", "nested_offset") if state.nested else ("absmax",)
    return dataclasses.replace(state, **{name: change(getattr(state, name)) for name in names})


def assert_nothing_beside(tensor: Tensor, before: int) -> None:
    """The buffer that `embedded` made still holds 0xFF around the tensor, into which a kernel has written."""
    buffer = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    first, n = before * tensor.itemsize, tensor.numel() * tensor.itemsize
    assert (buffer[:first] == 0xFF).all(), "wrote before a tensor"
    assert (buffer[first + n :] == 0xFF).all(), "wrote after a tensor"
