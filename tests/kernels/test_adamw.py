"""adamw against float64 and torch.optim.AdamW; cuts, memory, bad input."""

import pytest
import torch
from torch import Tensor

import kernels
from kernels import adamw, use_backend
from kernels.triton import launch
from tests.kernels.nf4_cases import assert_nothing_beside, assert_same, embedded, needs_triton, triton_device

SIZES = (0, 1, 5, 1023, 1024, 1025, 3000)
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs")


def state(sizes: tuple[int, ...] = SIZES, device: str = "cpu") -> list[list[Tensor]]:
    """params, grads, exp_avgs and exp_avg_sqs as they are in the middle of a run."""
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 0.01, 0.01, 1e-4)
    lists = [[torch.randn(n, generator=generator, device="cpu") * scale for n in sizes] for scale in scales]
    lists[3] = [v.abs() for v in lists[3]]
    return [[tensor.to(device) for tensor in tensors] for tensors in lists]


@pytest.mark.usefixtures("backend")
def test_steps_against_float64_and_torch():
    generator = torch.Generator().manual_seed(1)
    grads = [[torch.randn(n, generator=generator, device="cpu") for n in SIZES] for _ in range(5)]

    device = torch.get_default_device()

    def by_torch(dtype: torch.dtype) -> dict[str, list[Tensor]]:
        params = [p.to(device, dtype).requires_grad_() for p in state()[0]]
        optimizer = torch.optim.AdamW(params, **HYPER, fused=True)  # on GPUs its 1 - β is rounded to fp32
        for step in grads:
            for p, g in zip(params, step):
                p.grad = g.to(device, dtype)
            optimizer.step()
        moments = ([optimizer.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        return dict(zip(("params", "exp_avgs", "exp_avg_sqs"), ([p.detach() for p in params], *moments)))

    params = [p.to(device) for p in state()[0]]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for i, step in enumerate(grads, start=1):
        adamw(params, [g.to(device) for g in step], *moments, **HYPER, step=i)
    got, torchs, exact = (
        dict(zip(NAMES[:1] + NAMES[2:], (params, *moments))),
        by_torch(torch.float32),
        by_torch(torch.float64),
    )
    for name, tensors in exact.items():
        for mine, theirs, want in zip(got[name], torchs[name], tensors):
            if want.numel():
                error, torch_error = ((x - want).abs().max() for x in (mine, theirs))
                assert error <= 2 * torch_error + 4 * torch.finfo(torch.float32).eps * want.abs().max(), name


@needs_triton
@pytest.mark.parametrize("before", [1, 16], ids=["unaligned", "aligned"])
def test_the_kernel_reads_and_writes_its_own_memory_only(before):
    plain = state(device=triton_device())
    within_poison = [[embedded(tensor, before) for tensor in tensors] for tensors in plain]
    with use_backend("triton"):
        adamw(*plain, **HYPER, step=3)
        adamw(*within_poison, **HYPER, step=3)
    for name, mine, theirs in zip(NAMES, within_poison, plain):
        for a, b in zip(mine, theirs):
            assert_same(a, b, name)
            assert_nothing_beside(a, before)


@pytest.mark.usefixtures("backend")
def test_where_a_tensor_is_cut_between_blocks_changes_nothing():
    whole, parts = state((3001,), torch.get_default_device()), state((3001,), torch.get_default_device())
    adamw(*whole, **HYPER, step=3)
    views = [[tensors[0][a:b] for a, b in ((0, 256), (256, 1792), (1792, 3001))] for tensors in parts]
    adamw(*views, **HYPER, step=3)
    for name, one, other in zip(NAMES, whole, parts):
        assert torch.equal(one[0], other[0]), name


@pytest.mark.usefixtures("backend")
def test_opcheck():
    args = (*state((5, 300), torch.get_default_device()), 1e-3, 0.9, 0.99, 1e-8, 0.1, 3)
    torch.library.opcheck(torch.ops.qdora.adamw.default, args)


@needs_triton
@pytest.mark.parametrize("op", ["adamw", "adamw8bit"])
def test_all_tensors_share_a_launch(op):
    sizes = (300, 5000, 70000)
    fp32 = [[torch.zeros(n, device=triton_device()) for n in sizes] for _ in range(2)]
    if op == "adamw":
        lists = fp32 + [[torch.zeros_like(p) for p in fp32[0]] for _ in range(2)]
    else:
        lists = fp32 + [[torch.zeros_like(p, dtype=torch.uint8) for p in fp32[0]] for _ in range(2)]
        lists += [[torch.zeros(-(-n // 256), device=triton_device()) for n in sizes] for _ in range(2)]
    with use_backend("triton"), launch.recording() as launches:
        getattr(kernels, op)(*lists, lr=1e-3, step=1)
    assert len(launches) == 1


def test_meta_device_and_nothing_to_do():
    adamw(*[[torch.empty(5, device="meta")] for _ in NAMES], step=1, lr=1e-3)
    adamw([], [], [], [], step=1, lr=1e-3)


@pytest.mark.parametrize(
    "name, bad, message",
    [
        ("grads", [], "2 params but 0 grads"),
        (
            "params",
            [torch.zeros(4, dtype=torch.float16), torch.zeros(4)],
            r"params\[0\] must be contiguous torch.float32",
        ),
        ("exp_avgs", [torch.zeros(4), torch.zeros(5)], r"exp_avgs\[1\] must be .* of 4 values .* \[5\]"),
        ("grads", [torch.zeros(4), torch.zeros(8)[::2]], r"grads\[1\] must be contiguous .* strides \(2,\)"),
        ("exp_avg_sqs", [torch.zeros(4), torch.zeros(4, device="meta")], "must be .* on cpu, not .* on meta"),
    ],
)
def test_refuses(name, bad, message):
    lists = {name: [torch.zeros(4), torch.zeros(4)] for name in NAMES} | {name: bad}
    with pytest.raises(ValueError, match=message):
        adamw(*lists.values(), lr=1e-3, step=1)


def _lists(op: str, device: torch.device) -> list[list[Tensor]]:
    """The arguments of `op` in the middle of a run."""
    lists = state((300, 5000), device)
    if op == "adamw8bit":
        blocks = [[torch.rand(-(-p.numel() // 256), device=device) for p in lists[0]] for _ in range(2)]
        lists = [*lists[:2], *([(m.abs() * 1e3).to(torch.uint8) for m in moments] for moments in lists[2:]), *blocks]
    return lists


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op", ["adamw", "adamw8bit"])
def test_lr_and_step_on_the_device_give_the_same_bits(op):
    device = torch.get_default_device()
    torch.manual_seed(0)
    by_numbers = _lists(op, device)
    by_tensors = [[tensor.clone() for tensor in tensors] for tensors in by_numbers]
    skipped = [[tensor.clone() for tensor in tensors] for tensors in by_numbers]
    before = [[tensor.clone() for tensor in tensors] for tensors in by_numbers]
    lr, step = torch.tensor(HYPER["lr"], dtype=torch.float64, device=device), torch.zeros((), device=device)
    finite, infinite = torch.zeros((), device=device), torch.ones((), device=device)
    for i in (1, 2, 7):
        getattr(kernels, op)(*by_numbers, **HYPER, step=i)
        step.fill_(i)
        getattr(kernels, op)(*by_tensors, **HYPER | {"lr": lr}, step=step, found_inf=finite)
        getattr(kernels, op)(*skipped, **HYPER | {"lr": lr}, step=step, found_inf=infinite)
    for numbers, tensors, same, old in zip(by_numbers, by_tensors, skipped, before):
        for a, b, c, d in zip(numbers, tensors, same, old):
            assert torch.equal(a, b) and torch.equal(c, d)


def test_a_skipped_step_keeps_what_is_not_a_number_away():
    for op in ("adamw", "adamw8bit"):
        lists = _lists(op, torch.device("cpu"))
        lists[1][0].fill_(float("nan"))
        before = [[tensor.clone() for tensor in tensors] for tensors in lists]
        lr, step = torch.tensor(0.1, dtype=torch.float64), torch.ones(())
        getattr(kernels, op)(*lists, lr=lr, step=step, found_inf=torch.ones(()))
        for i, (now, old) in enumerate(zip(lists, before)):
            assert i == 1 or all(torch.equal(a, b) for a, b in zip(now, old))


def test_a_number_beside_a_tensor_is_refused():
    with pytest.raises(ValueError, match="two numbers or two tensors, not float and Tensor"):
        adamw(*[[torch.zeros(4)] for _ in NAMES], lr=1e-3, step=torch.ones(()))
