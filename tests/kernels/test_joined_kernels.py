"""The Triton kernels of joined_linears where the tests of the op do not look: many tiles, memory, launches."""

import functools

import pytest
import torch

from kernels import Weight, use_backend, weight_norm_sq
from kernels.joined import _joined_linears, _joined_linears_backward
from kernels.triton import joined
from kernels.triton.case import meta, meta_packed
from kernels.triton.dora_norm import _norm_nf4_kernel, finish_kernel
from kernels.triton.gemm import gemm_kernel
from kernels.triton.launch import recording
from kernels.triton.low_rank import project_kernel, projects_kernel
from kernels.triton.outer import outer_kernel
from tests.kernels.linear_cases import assert_as_accurate, plain_linear, randn, with_gradients
from tests.kernels.nf4_cases import embedded, guarded_memory, needs_triton


@needs_triton
@pytest.mark.usefixtures("on_triton_device")
@pytest.mark.parametrize("library", [False, True], ids=["own-gemm", "library-gemm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_four_linears_over_many_tiles(dtype, library, monkeypatch):
    """Ranks and sizes that differ, LoRA and DoRA, one linear more than a launch of the gradients of A and B takes."""
    monkeypatch.setattr("kernels.triton.gemm.use_library", lambda x: library)
    if dtype == torch.float32:  # tiles are 64 × 64 × 16, and 128 × 128 × 64 in fp16
        tokens, columns, outs, ranks = 66, 36, (68, 33, 20, 66), (18, 3, 20, 16)
    else:
        tokens, columns, outs, ranks = 150, 140, (270, 33, 68, 130), (18, 3, 70, 16)
    dora, scalings = (True, False, False, True), (1.5, 0.7, 2.0, 1.0)
    x = embedded(randn(tokens, columns, seed=1, dtype=dtype), 64)
    ws = [embedded(randn(out, columns, seed=10 + i, dtype=dtype) / columns**0.5, 64) for i, out in enumerate(outs)]
    lora_A = [embedded(randn(r, columns, seed=20 + i) / columns**0.5, 64) for i, r in enumerate(ranks)]
    lora_B = [embedded(randn(out, r, seed=30 + i) / r**0.5, 64) for i, (out, r) in enumerate(zip(outs, ranks))]
    weights = [Weight(w) for w in ws]
    magnitude = [randn(out, seed=40 + i).abs() + 0.5 if one else None for i, (out, one) in enumerate(zip(outs, dora))]
    norm_sq = [None if m is None else weight_norm_sq(weight) for m, weight in zip(magnitude, weights)]
    dys = [embedded(randn(tokens, out, seed=50 + i, dtype=dtype), 64) for i, out in enumerate(outs)]
    adapters = lora_A, lora_B, magnitude

    def forward_and_backward():
        ys, kept = _joined_linears(x, weights, *adapters, norm_sq, [None] * len(outs), list(scalings))
        given = [None if m is None else y for m, y in zip(magnitude, ys)]
        dx, *others = _joined_linears_backward(dys, x, given, kept, weights, *adapters, list(scalings), True)
        return named(torch.cat(ys, 1), dx, *others)

    def named(y, dx, dA, dB, dm):
        lists = {"dA": dA, "dB": dB, "dm": dm}
        return {"y": y, "dx": dx} | {
            f"{name}{i}": tensor
            for name, tensors in lists.items()
            for i, tensor in enumerate(tensors)
            if tensor.numel()
        }

    def plain(x, **t):
        dtype = x.dtype
        of_one = [
            plain_linear(x, w.to(dtype), t[f"A{i}"], t[f"B{i}"], s, None, t.get(f"m{i}"))
            for i, (w, s) in enumerate(zip(ws, scalings))
        ]
        return torch.cat(of_one, 1)

    def in_torch(dtype):
        leaves = {"x": x} | {f"A{i}": A for i, A in enumerate(lora_A)} | {f"B{i}": B for i, B in enumerate(lora_B)}
        leaves |= {f"m{i}": m for i, m in enumerate(magnitude) if m is not None}
        return with_gradients(plain, {name: leaf.to(dtype) for name, leaf in leaves.items()}, torch.cat(dys, 1))

    with use_backend("triton"):
        again = forward_and_backward()
        with guarded_memory(monkeypatch):
            got = forward_and_backward()
    assert_as_accurate(got, in_torch(dtype), in_torch(torch.float64), dtype)
    for name, tensor in again.items():
        assert torch.equal(tensor, got[name]), f"{name} differs from run to run"


def calls(linears: int, dora: bool, known: bool = False):
    """(forward, backward) of linears over NF4 with 2048 tokens, on tensors without memory."""
    x, rank, out = meta(2048, 4096, dtype="bf16"), 16, 4096
    weights = [meta_packed(out, 4096) for _ in range(linears)]
    vectors = [meta(out) if dora else None for _ in range(linears)]
    adapters = [meta(rank, 4096)] * linears, [meta(out, rank)] * linears, vectors
    kept = [meta(linears * rank, 4096, dtype="bf16"), meta(2048, linears * rank, dtype="bf16")]
    kept += [meta(out, rank, dtype="bf16")] * linears + [meta(out if dora else 0)] * 2 * linears
    ys = [meta(2048, out, dtype="bf16")] * linears
    norms = vectors if known else [None] * linears
    forward = functools.partial(joined.joined_linears, x, weights, *adapters, vectors, norms, [2.0] * linears)
    given = (ys, x, ys, kept, weights, *adapters, [2.0] * linears, True)
    return forward, functools.partial(joined.joined_linears_backward, *given)


def test_a_known_norm_takes_one_launch():
    with recording() as launches:
        calls(3, dora=True)[0]()
    norms = [launch.kernel for launch in launches].count(_norm_nf4_kernel)
    with recording() as with_known:
        calls(3, dora=True, known=True)[0]()
    kernels = [launch.kernel for launch in with_known]
    assert norms == kernels.count(finish_kernel) == 3 and _norm_nf4_kernel not in kernels


@pytest.mark.parametrize("linears", [2, 3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_launches(linears, dora):
    """One thin product for all A and one launch for all dA and dB, however many linears there are."""
    forward, backward = calls(linears, dora)
    with recording() as launches:
        forward()
    kernels = [launch.kernel for launch in launches]
    assert (kernels.count(project_kernel), kernels.count(gemm_kernel)) == (1, linears)
    with recording() as launches:
        backward()
    kernels = [launch.kernel for launch in launches]
    # all dxa; all dA and dB; [dxa₁ …] Ā, and each product that adds itself to it
    assert (kernels.count(projects_kernel), kernels.count(outer_kernel)) == (1, 1)
    assert kernels.count(gemm_kernel) == 1 + linears
    written = {id(launch.arguments["y_ptr"]) for launch in launches if launch.kernel is gemm_kernel}
    assert len(written) == 1, "more than one gradient of x is in memory"
