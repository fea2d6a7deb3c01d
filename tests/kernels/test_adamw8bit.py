"""adamw8bit against bitsandbytes and float64; the kernel is the reference bit for bit; codes, memory, bad input.

bitsandbytes 0.50.2 has two implementations that run without a GPU: its CPU optimizer, which looks codes up at 65536
points, and the Triton kernel of its GPU backends, which takes the nearest code as we do, in the interpreter.
"""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from kernels import adamw8bit, use_backend
from kernels.adamw8bit import state_blocks
from kernels.codebook import dynamic_bins, dynamic_bounds, dynamic_map
from kernels.reference import adamw8bit as reference
from tests.kernels.nf4_cases import assert_nothing_beside, assert_same, embedded, needs_triton, triton_device

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

SIZES = (0, 1, 255, 256, 257, 1024, 1025, 2300)
KINDS = ("normal", "zeros", "denormal", "huge", "infinite", "nan")
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "exp_avg_absmax", "exp_avg_sq_absmax")
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def state(sizes=SIZES, kind: str = "normal", device: str = "cpu") -> list[list[Tensor]]:
    """The six lists as they are in the middle of a run, with special gradients by `kind`."""
    generator = torch.Generator().manual_seed(0)

    def randn(scale: float) -> list[Tensor]:
        return [torch.randn(n, generator=generator, device="cpu") * scale for n in sizes]

    params, grads, exp_avgs, exp_avg_sqs = randn(1.0), randn(0.01), randn(0.01), [v.square() for v in randn(0.01)]
    for g in grads:
        if kind == "zeros":
            g[: 2 * len(g) // 3] = 0
        if kind == "denormal":
            g *= 1e-20  # whose square is denormal
        if kind == "huge":
            g *= 1e18
        if kind in ("infinite", "nan"):
            g[len(g) // 3 :: 300] = torch.inf if kind == "infinite" else torch.nan
    if kind in ("zeros", "denormal"):
        exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
    codes = [
        [reference.quantize_state(x.clone(), signed) for x in xs]
        for xs, signed in ((exp_avgs, True), (exp_avg_sqs, False))
    ]
    lists = params, grads, *([c for c, _ in pairs] for pairs in codes), *([a for _, a in pairs] for pairs in codes)
    return [[tensor.to(device) for tensor in tensors] for tensors in lists]


def exact_step(lists: list[list[Tensor]], i: int, step: int) -> dict[str, Tensor]:
    """The new p, exp_avg and exp_avg_sq of tensor i in float64."""
    p, g, *codes = (tensors[i].cpu() for tensors in lists)
    m, v = (
        reference.dequantize_state(code, absmax, signed).double()
        for code, absmax, signed in zip(codes[:2], codes[2:], (True, False))
    )
    (beta1, beta2), g = HYPER["betas"], g.double()
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + HYPER["eps"]
    p = p.double() * (1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"] / (1 - beta1**step) * m / denominator
    return {"p": p, "exp_avg": m, "exp_avg_sq": v}


# ------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_the_maps_are_bitsandbytes(signed):
    assert_same(dynamic_map(signed=signed), bnb.create_dynamic_map(signed=signed), "map")


def near_bounds(signed: bool) -> Tensor:
    """Every decision bound and its neighbours, every map value, and a sweep over the fp32 numbers of [-1, 1]."""
    bounds = dynamic_bounds(signed=signed)[:255].view(torch.int32)
    close = (bounds[:, None] + torch.arange(-2, 3, dtype=torch.int32)).view(-1).view(torch.float32)
    sweep = torch.arange(0, 0x3F800001, 524287, dtype=torch.int32).view(torch.float32)
    x = torch.cat([close, dynamic_map(signed=signed), sweep, torch.ones(1)])
    return torch.cat([x, -x]) if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_the_bins_lead_to_the_nearest_code(signed):
    x = near_bounds(signed)
    below = dynamic_bins(signed=signed)[(x.view(torch.int32) >> 16 & 0xFFFF).long()]
    codes = below + (x > dynamic_bounds(signed=signed)[below.long()])
    values = dynamic_map(signed=signed).double()
    distance = (x.double()[:, None] - values).abs()
    assert (
        distance.gather(1, codes.long()[:, None])[:, 0] <= distance.amin(dim=1) + 2**-24
    ).all()  # a bound is a rounded number too
    assert torch.equal(codes.long(), torch.bucketize(x, dynamic_bounds(signed=signed)))


@needs_triton
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_the_kernel_finds_the_nearest_code_everywhere(signed):
    """With β = 0 the new state is the gradient, or its square; a 1 in each block leaves the others as they are."""
    x = near_bounds(signed) if signed else near_bounds(signed).sqrt()
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    g = torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1).view(-1).to(triton_device())
    n = g.numel()
    codes, absmax = (torch.zeros(n, dtype=torch.uint8, device=g.device), torch.zeros(n // 256, device=g.device))
    lists = [[torch.zeros_like(g)], [g], [codes], [codes.clone()], [absmax], [absmax.clone()]]
    with use_backend("triton"):
        adamw8bit(*lists, lr=1e-3, betas=(0.0, 0.0), step=1)
    got, scaled = (lists[2][0], g) if signed else (lists[3][0], g * g)
    assert torch.equal(got.long(), torch.bucketize(scaled, dynamic_bounds(g.device, signed)))


# ---------------------------------------------------------------------------------- beside bitsandbytes


def bnb_cpu_step(lists: list[list[Tensor]], i: int, step: int) -> list[Tensor]:
    """One step of bitsandbytes' CPU optimizer on tensor i: its six tensors afterwards."""
    p, g, m, v, m_absmax, v_absmax = (tensors[i].cpu().clone() for tensors in lists)
    maps = (dynamic_map("cpu"), dynamic_map("cpu", False))
    bnb.optimizer_update_8bit_blockwise(
        "adam", g, p, m, v, *HYPER["betas"], 0.0, 0.0, HYPER["eps"], step, HYPER["lr"], *maps, m_absmax, v_absmax,
        HYPER["weight_decay"], 1.0, False,
    )  # fmt: skip
    return [p, g, m, v, m_absmax, v_absmax]


def bnb_triton_step(lists: list[list[Tensor]], i: int, step: int) -> list[Tensor]:
    """The same by the Triton kernel of its GPU backends."""
    from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_impl

    p, g, m, v, m_absmax, v_absmax = (tensors[i].clone() for tensors in lists)
    maps = (dynamic_map(p.device), dynamic_map(p.device, False))
    optimizer_update_8bit_blockwise_impl(
        "adam", g, p, m, v, *HYPER["betas"], 0.0, 0.0, HYPER["eps"], step, HYPER["lr"], *maps, m_absmax, v_absmax,
        HYPER["weight_decay"], 1.0,
    )  # fmt: skip
    return [p, g, m, v, m_absmax, v_absmax]


def stepped(lists: list[list[Tensor]], step: int) -> list[list[Tensor]]:
    new = [[tensor.clone() for tensor in tensors] for tensors in lists]
    adamw8bit(*new, **HYPER, step=step)
    return new


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("step", [1, 100])
def test_a_step_equals_bitsandbytes_cpu_optimizer_within_its_rounding(step):
    """From the same state: p and absmax to fp32 rounding; states no farther from the exact ones than its own are, and
    from its own by no more than a code's width and the 1/65535 of absmax that its table rounds to."""
    before = state(device=torch.get_default_device())
    after = stepped(before, step)
    for i, n in enumerate(SIZES):
        if not n:
            continue
        ours, theirs, exact = (
            [tensors[i].cpu() for tensors in after],
            bnb_cpu_step(before, i, step),
            exact_step(before, i, step),
        )
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
        for k, (name, signed) in enumerate(SIGNED.items()):
            torch.testing.assert_close(ours[4 + k], theirs[4 + k], rtol=1e-6, atol=0)
            absmax = ours[4 + k].repeat_interleave(256)[:n]
            mine, their = (reference.dequantize_state(side[2 + k], side[4 + k], signed) for side in (ours, theirs))
            error, their_error = (mine - exact[name]).abs(), (their - exact[name]).abs()
            assert (error <= their_error + 1e-6 * absmax).all(), name
            width = torch.diff(
                dynamic_map("cpu", signed), prepend=torch.tensor([-1.0 if signed else 0.0], device="cpu")
            )
            gap = torch.maximum(width[ours[2 + k].long()], width[(ours[2 + k].int() + 1).clamp(max=255)]) * absmax
            assert ((mine - their).abs() <= gap + absmax * (1 / 65535 + 1e-6)).all(), name


@needs_triton
@pytest.mark.parametrize("step", [1, 100])
def test_a_step_equals_bitsandbytes_triton_kernel(step):
    """From the same state; a code may differ only where the state is within fp32 rounding of the bound between two."""
    before = state(device=triton_device())
    with use_backend("triton"):
        after = stepped(before, step)
    differing = 0
    for i, n in enumerate(SIZES):
        if not n:
            continue
        ours, theirs, exact = (
            [tensors[i].cpu() for tensors in after],
            bnb_triton_step(before, i, step),
            exact_step(before, i, step),
        )
        p, their_p = before[0][i].cpu(), theirs[0].cpu()  # the update may cancel nearly all of p, but not its rounding
        assert ((ours[0] - their_p).abs() <= 1e-6 * (p.abs() + their_p.abs()) + 1e-7).all()
        for k, (name, signed) in enumerate(SIGNED.items()):
            torch.testing.assert_close(ours[4 + k], theirs[4 + k].cpu(), rtol=1e-6, atol=0)
            mine, their = ours[2 + k].int(), theirs[2 + k].cpu().int()
            other = (mine != their).nonzero().view(-1)
            differing += len(other)
            scaled = (exact[name] / ours[4 + k].repeat_interleave(256)[:n].double())[other]
            bound = dynamic_bounds("cpu", signed)[torch.minimum(mine, their)[other].long()]
            assert ((mine - their)[other].abs() == 1).all() and ((scaled - bound).abs() < 1e-6).all(), name
    assert differing <= 2, f"{differing} of {2 * sum(SIZES)} codes differ"


# -------------------------------------------------------------------------------------------- the kernel


@needs_triton
@pytest.mark.parametrize("kind, before", [("normal", 1), *((kind, 16) for kind in KINDS)])
def test_the_kernel_is_the_reference_bit_for_bit_and_writes_its_own_memory_only(kind, before):
    want = state(kind=kind, device=triton_device())
    got = [[embedded(tensor, before) for tensor in tensors] for tensors in want]
    for step in (1, 2):
        with use_backend("reference"):
            adamw8bit(*want, **HYPER, step=step)
        with use_backend("triton"):
            adamw8bit(*got, **HYPER, step=step)
        for name, mine, theirs in zip(NAMES, got, want):
            for a, b in zip(mine, theirs):
                assert_same(a, b, f"{name}, step {step}")
                assert_nothing_beside(a, before)


@pytest.mark.usefixtures("backend")
def test_where_a_tensor_is_cut_between_blocks_changes_nothing(monkeypatch):
    monkeypatch.setattr("kernels.reference.adamw8bit.CHUNK", 512)
    whole, parts = (state((3001,), device=torch.get_default_device()) for _ in range(2))
    adamw8bit(*whole, **HYPER, step=3)
    cuts = ((0, 256), (256, 1792), (1792, 3001))
    views = [[tensors[0][a:b] for a, b in cuts] for tensors in parts[:4]]
    views += [[tensors[0][a // 256 : state_blocks(b)] for a, b in cuts] for tensors in parts[4:]]
    adamw8bit(*views, **HYPER, step=3)
    for name, one, other in zip(NAMES, whole, parts):
        assert torch.equal(one[0], other[0]), name


@pytest.mark.usefixtures("backend")
def test_a_lost_gradient_is_seen():
    """A NaN makes its block's absmax NaN, an infinity makes it infinite; the other blocks are as without it."""
    clean, lost = (state((1000,), device=torch.get_default_device()) for _ in range(2))
    lost[1][0][300], lost[1][0][600] = torch.nan, torch.inf
    adamw8bit(*clean, **HYPER, step=3)
    adamw8bit(*lost, **HYPER, step=3)
    for absmax, as_clean in zip(lost[4:], clean[4:]):
        assert absmax[0][1].isnan() and absmax[0][2].isinf()
        assert torch.equal(absmax[0][[0, 3]], as_clean[0][[0, 3]])


@pytest.mark.usefixtures("backend")
def test_opcheck():
    args = (*state((5, 300), device=torch.get_default_device()), 1e-3, 0.9, 0.99, 1e-8, 0.1, 3)
    torch.library.opcheck(torch.ops.qdora.adamw8bit.default, args)


def test_refuses():
    good = [
        [t] for t in (torch.zeros(300), torch.zeros(300), *torch.zeros(2, 300, dtype=torch.uint8), *torch.zeros(2, 2))
    ]
    for name, bad, message in [
        ("exp_avgs", torch.zeros(300), r"exp_avgs\[0\] must be contiguous torch.uint8 of 300 values"),
        (
            "exp_avg_absmax",
            torch.zeros(1),
            r"exp_avg_absmax\[0\] must be contiguous torch.float32 of 2 values .* \[1\]",
        ),
        ("grads", torch.zeros(600)[::2], r"grads\[0\] must be contiguous .* strides \(2,\)"),
    ]:
        lists = dict(zip(NAMES, good)) | {name: [bad]}
        with pytest.raises(ValueError, match=message):
            adamw8bit(*lists.values(), lr=1e-3, step=1)
