"""The Triton kernels of experts where the tests of the op do not look: many tiles, memory, parts, launches, the
library's product."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import Weight, experts_dora, experts_linear, experts_lora, use_backend
from kernels import weight_norm_sq as norm_sq_of
from kernels.experts import (
    _experts_dora,
    _experts_dora_backward,
    _experts_linear,
    _experts_lora,
    _experts_lora_backward,
)
from kernels.triton import experts
from kernels.triton.case import meta, meta_packed
from kernels.triton.experts_weights import _dequantize_kernel, _norm_nf4_kernel
from kernels.triton.grouped import _grouped_kernel, use_library
from kernels.triton.launch import recording
from kernels.weight import PART_BYTES
from tests.kernels.experts_cases import SCALING, Shape, make_experts, make_tensors, plain_experts
from tests.kernels.linear_cases import assert_as_accurate, dropout_seed, to_dtype, with_gradients
from tests.kernels.nf4_cases import embedded, guarded_memory, needs_triton


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize(
    ("variant", "library"), [("lora-dropout", True), ("dora", False), ("dora-bias-dropout", True)], ids=str
)
def test_many_tiles_write_all_of_their_outputs_and_nothing_else(variant, library, monkeypatch):
    """Several tiles of rows of an expert, of columns and of ranks, with tails; inputs between poison, outputs that held
    NaN before; the library leaves the rows that belong to nobody as they were."""
    dtype = torch.float16
    monkeypatch.setattr("kernels.triton.grouped.use_library", lambda x, w: library)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", library_product)
    p = 0.2 if "dropout" in variant else 0.0
    shape = Shape((150, 0, 3), nobody=20, columns=136, out=72, rank=130, bias="bias" in variant, p=p)
    weight, w = make_experts("nf4-double", shape, dtype)
    tensors, bias, dy = make_tensors(variant.split("-")[0], shape, dtype)
    if "magnitude" in tensors:
        tensors["magnitude"][:, [3, 40, -1]] = 0
    x, *adapter = (embedded(t, 64) for t in tensors.values())
    weight, dy, ends = (
        Weight(embedded(weight.values, 64), weight.quant_state),
        embedded(dy, 64),
        embedded(shape.ends, 1),
    )
    rest = (SCALING, p, dropout_seed())

    def forward_and_backward():
        if len(adapter) == 2:
            y, xa = _experts_lora(x, ends, weight, *adapter, bias, *rest)
            return y, *_experts_lora_backward(dy, x, xa, ends, weight, *adapter, *rest, True)
        norm_sq = norm_sq_of(weight.rows()).view(3, shape.out)
        y, xa, norm, gain, z = _experts_dora(x, ends, weight, norm_sq, None, *adapter, bias, *rest)
        kept = (None if len(z) else y, z, norm, gain)
        return y, *_experts_dora_backward(dy, x, xa, *kept, ends, weight, *adapter, *rest, True)

    with use_backend("triton"):
        again = forward_and_backward()
        with guarded_memory(monkeypatch):
            got = forward_and_backward()
    names = ("y", *(f"d{name}" for name in tensors))
    plain = plain_experts(shape, w, bias)
    exact = with_gradients(plain, to_dtype(tensors, torch.float64), dy)
    at_dtype = with_gradients(plain, to_dtype(tensors, dtype), dy)
    assert_as_accurate(dict(zip(names, got)), at_dtype, exact, dtype)
    for name, first, second in zip(names, got, again):
        assert torch.equal(first, second), f"{name} differs from run to run"


def library_product(x, w, *, offs):
    y, start = torch.full((len(x), w.shape[2]), torch.nan, dtype=x.dtype, device=x.device), 0
    for e, end in enumerate(offs.tolist()):
        y[start:end], start = x[start:end] @ w[e], end
    return y


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
def test_experts_without_rows_are_not_dequantized(monkeypatch):
    """32 experts of two programs' values each, of which one has rows: fresh memory of the others stays as it was."""
    shape = Shape((0,) * 20 + (5,) + (0,) * 11, columns=256, out=128)
    weight, _ = make_experts("nf4-double", shape, torch.float16)
    with guarded_memory(monkeypatch):
        ((_, dense),) = experts.dense_parts(weight, shape.ends, torch.float16)
        assert torch.equal(dense[20], weight.dense()[20])
        assert (dense[:20].view(torch.int16) == -1).all() and (dense[21:].view(torch.int16) == -1).all()


def test_the_library_is_asked_only_where_it_has_a_kernel():
    x, w = meta(64, 128, dtype="bf16"), meta(4, 96, 128, dtype="bf16")
    assert not use_library(x, w.mT)  # not on a GPU


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize(
    ("op", "kind", "shape", "of_part"),
    [
        ("linear", "nf4", Shape((3, 0, 9, 1, 2), nobody=3, columns=33, out=17, bias=True), 2),
        ("lora", "nf4-double", Shape((0, 2, 18, 0, 1), nobody=2, columns=40, out=33, rank=3, p=0.2), 1),
        ("dora", "nf4-double", Shape((2, 0, 0, 0, 17), columns=34, out=33, rank=4), 3),
        ("dora", "mxfp4", Shape((3, 1, 0, 2, 0), nobody=1, columns=32, out=31, rank=4, bias=True, p=0.2), 1),
    ],
    ids=str,
)
def test_parts_give_the_same_bits(op, kind, shape, of_part, monkeypatch):
    """Experts that become dense a few at a time, also where blocks, nested blocks or bytes cross from one part into the
    next; a magnitude of 0 has DoRA read dense weights in backward."""
    weight, _ = make_experts(kind, shape, torch.float16)
    tensors, bias, dy = make_tensors(op, shape, torch.float16)
    if op == "dora":
        tensors["magnitude"][:, ::5] = 0
    given = {"ends": shape.ends, "weight": weight, "bias": bias}
    if op != "linear":
        given |= {"scaling": SCALING, "dropout": shape.p, "seed": dropout_seed()}
    if op == "dora":
        given["norm_sq"] = norm_sq_of(weight.rows()).view(5, shape.out)
    run = functools.partial({"linear": experts_linear, "lora": experts_lora, "dora": experts_dora}[op], **given)
    with use_backend("triton"):
        want = with_gradients(run, tensors, dy)
        monkeypatch.setattr("kernels.weight.PART_BYTES", of_part * shape.out * shape.columns * 2 + 1)
        with guarded_memory(monkeypatch):
            got = with_gradients(run, tensors, dy)
    for name in want:
        assert torch.equal(got[name], want[name]), name


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made inside."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func._schema.returns[0].alias_info:  # not a view, nor in place
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.mark.parametrize(
    ("shape", "parts"), [((8, 28672, 4096), 8), ((8, 4096, 14336), 4), ((128, 1536, 2048), 4), ((32, 5760, 2880), 4)]
)
def test_a_call_makes_no_more_than_a_part_dense(shape, parts):
    """Of Mixtral, Qwen3-30B-A3B and gpt-oss-20b. And the host does not wait: all of it runs on tensors without memory.
    How many launches there are depends on the bytes of the weights alone."""
    count, out, columns = shape
    x, dy, weight = meta(64, columns, dtype="bf16"), meta(64, out, dtype="bf16"), meta_packed(*shape)
    ends, of_rows = meta(count, dtype=torch.int32), meta(count, out)
    adapter = (meta(count, 1, columns), meta(count, out, 1))
    of_lora = (ends, weight, *adapter, 2.0, 0.0, None)
    with recording() as launches, Largest() as largest:
        _, xa = experts.experts_lora(x, *of_lora[:4], None, *of_lora[4:])
        forward = len(launches)
        experts.experts_lora_backward(dy, x, xa, *of_lora, True)
        assert (forward, len(launches) - forward) == (1 + 2 * parts, 2 + 2 * parts)
        for norm in (None, of_rows):
            launches.clear()
            of_dora = (of_rows, norm, *adapter, of_rows, None, 2.0, 0.0, None)
            y, xa, norm_now, gain, z = experts.experts_dora(x, ends, weight, *of_dora)
            kernels = [launch.kernel for launch in launches]
            assert len(kernels) == (3 if norm is None else 2) + 2 * parts
            assert kernels.count(_norm_nf4_kernel) == (norm is None)
            assert kernels.count(_dequantize_kernel) == kernels.count(_grouped_kernel) == parts
            launches.clear()
            kept = (x, xa, y, z, norm_now, gain)
            experts.experts_dora_backward(dy, *kept, ends, weight, *adapter, of_rows, 2.0, 0.0, None, True)
            assert len(launches) == 1 + 4 * parts
    assert 2**27 < largest.bytes <= PART_BYTES == 2**28 < weight.shape.numel() * 2


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize("ends", [(9, 9), (3, 9)], ids=str)
def test_ends_behind_the_rows_of_x_read_nothing_beside_it(ends):
    """The host does not look at ends, so kernels do."""
    shape = Shape((3, 4), columns=32, out=16)
    weight, _ = make_experts("dense", shape, torch.float32)
    x = embedded(make_tensors("linear", shape, torch.float32)[0]["x"], 64)
    with use_backend("triton"):
        y = _experts_linear(x, torch.tensor(ends, dtype=torch.int32), weight, None)
        want = _experts_linear(x, torch.tensor(ends, dtype=torch.int32).clamp(max=7), weight, None)
    assert torch.equal(y, want)
