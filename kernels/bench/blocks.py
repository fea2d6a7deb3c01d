"""The ops between the linears, forward and backward, beside the formula in eager PyTorch and Liger."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels import linear_cross_entropy, rms_norm, rotary, swiglu
from kernels.bench.checks import as_accurate
from kernels.bench.spec import DTYPES, Bench, Inputs, Result, Unavailable, randn

EPS = 1e-6
HEADS, KV_HEADS, HEAD = 32, 8, 128  # of Llama-3-8B
OF_MODELS = (4096, 8192)  # Llama-3's hidden sizes; its MLPs' are 14336 and 28672


def _inputs(tensors: Mapping[str, tuple], tokens: int, device: torch.device, dtype: str) -> Inputs:
    """Random tensors of these shapes. Those that begin with "d" are gradients of results, others get gradients."""
    return {
        name: randn(*(tokens if size is None else size for size in shape), seed=i).to(device, DTYPES[dtype])
        for i, (name, shape) in enumerate(tensors.items())
    }


def _timed(inputs: Inputs, leaves: tuple[str, ...], op: Callable[..., tuple[Tensor, ...]]) -> Callable[[], Result]:
    """The function to time: op(inputs) and the gradients of `leaves`. Copies, as some write into their arguments."""
    mine = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in leaves:
        mine[name].requires_grad_()
    dys = [mine[name] for name in mine if name.startswith("d")]

    def run() -> Result:
        ys = op(**{name: tensor for name, tensor in mine.items() if not name.startswith("d")})
        given = [dy.to(y.dtype) for dy, y in zip(dys, ys)] if dys else None
        gradients = torch.autograd.grad(ys, [mine[name] for name in leaves], given)
        return {f"y{i}": y.detach() for i, y in enumerate(ys)} | {f"d{n}": g for n, g in zip(leaves, gradients)}

    return run


def _eager_norm(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype),)


def _eager_swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (torch.nn.functional.silu(gate) * up,)


def _eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    return turned(q), turned(k)


def _eager_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return (torch.nn.functional.cross_entropy(logits, targets, reduction="sum"),)


def _liger(name: str, **settings) -> Callable[..., tuple[Tensor, ...]]:
    """Liger's function of this name."""

    def op(**inputs: Tensor) -> tuple[Tensor, ...]:
        if not next(iter(inputs.values())).is_cuda:
            raise Unavailable("Liger runs on GPUs only")
        from liger_kernel.transformers import functional

        found = getattr(functional, name)(*inputs.values(), **settings)
        return found if isinstance(found, tuple) else (found,)

    return op


def _one(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda **inputs: (op(**inputs),)


def _bench(
    kernel: str,
    leaves: tuple[str, ...],
    inputs: Callable[..., Inputs],
    ops: Mapping[str, Callable[..., tuple[Tensor, ...]]],
    cost: Callable[..., tuple[int, int]],
    shapes: tuple[Mapping[str, int], ...],
    shapes_on_gpu: tuple[Mapping[str, int], ...],
    products: bool = False,
) -> Bench:
    def provider(op: Callable[..., tuple[Tensor, ...]]) -> Callable[[Inputs], Callable[[], Result]]:
        return lambda inputs: _timed(inputs, leaves, op)

    def check(inputs: Inputs) -> Callable[[Result], None]:
        precise = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        eager = provider(ops["torch"])
        dtype = next(iter(inputs.values())).dtype
        return as_accurate(eager(precise)(), eager(inputs)(), dtype)

    return Bench(
        kernel=kernel,
        mode="forward+backward",
        unit="token",
        sizes=(128, 1024),
        quick_sizes=(8,),
        configs=tuple({"dtype": dtype} | shape for shape in shapes for dtype in DTYPES),
        sizes_of_models=(512, 2048, 8192),
        configs_of_models=tuple({"dtype": "bf16"} | shape for shape in shapes_on_gpu),
        inputs=inputs,
        providers={name: provider(op) for name, op in ops.items()},
        check=check,
        cost=cost,
        products=products,
    )


def _norm_inputs(tokens: int, device: torch.device, dtype: str, features: int) -> Inputs:
    shapes = {"x": (None, features), "weight": (features,), "dy": (None, features)}
    return _inputs(shapes, tokens, device, dtype)


def _swiglu_inputs(tokens: int, device: torch.device, dtype: str, features: int) -> Inputs:
    return _inputs(dict.fromkeys(("gate", "up", "dy"), (None, features)), tokens, device, dtype)


def _rotary_inputs(tokens: int, device: torch.device, dtype: str, heads: int, kv_heads: int, head: int) -> Inputs:
    q, k = (1, heads, None, head), (1, kv_heads, None, head)
    angles = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(0, head, 2) / head)).repeat(1, 2).unsqueeze(0)
    made = _inputs({"q": q, "k": k, "dq": q, "dk": k}, tokens, device, dtype)
    cos, sin = (angle.to(device, DTYPES[dtype]) for angle in (angles.cos(), angles.sin()))
    return {"q": made["q"], "k": made["k"], "cos": cos, "sin": sin, "dq": made["dq"], "dk": made["dk"]}


def _loss_inputs(tokens: int, device: torch.device, dtype: str, features: int, vocabulary: int) -> Inputs:
    made = _inputs({"hidden": (None, features), "weight": (vocabulary, features)}, tokens, device, dtype)
    made["weight"] /= features**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    return made | {"targets": targets}


def _loss_cost(tokens: int, dtype: str, features: int, vocabulary: int) -> tuple[int, int]:
    """The head is read once, hidden states once, their gradient is written: logits are nowhere."""
    size = DTYPES[dtype].itemsize
    return size * (vocabulary * features + 2 * tokens * features), 4 * tokens * features * vocabulary


def _elements(each: int) -> Callable[..., tuple[int, int]]:
    return lambda tokens, dtype, features: (each * DTYPES[dtype].itemsize * tokens * features, tokens * features)


def _rotary_cost(tokens: int, dtype: str, heads: int, kv_heads: int, head: int) -> tuple[int, int]:
    elements = tokens * (heads + kv_heads) * head
    return 4 * DTYPES[dtype].itemsize * elements, 6 * elements


BENCHES = (
    _bench(
        "rms_norm",
        ("x",),
        _norm_inputs,
        {
            "ours": _one(lambda x, weight: rms_norm(x, weight, EPS)),
            "torch": _eager_norm,
            "liger": _liger("liger_rms_norm", eps=EPS, in_place=False),
        },
        _elements(5),  # x, y; dy, x, dx
        ({"features": 576},),
        tuple({"features": features} for features in OF_MODELS),
    ),
    _bench(
        "swiglu",
        ("gate", "up"),
        _swiglu_inputs,
        {"ours": _one(swiglu), "torch": _eager_swiglu, "liger": _liger("liger_swiglu")},
        _elements(8),  # gate, up, y; dy, gate, up and both gradients
        ({"features": 1536},),
        ({"features": 14336}, {"features": 28672}),
    ),
    _bench(
        "rotary",
        ("q", "k"),
        _rotary_inputs,
        {"ours": rotary, "torch": _eager_rotary, "liger": _liger("liger_rope")},
        _rotary_cost,
        ({"heads": 9, "kv_heads": 3, "head": 64},),
        ({"heads": HEADS, "kv_heads": KV_HEADS, "head": HEAD},),
    ),
    _bench(
        "linear_cross_entropy",
        ("hidden",),
        _loss_inputs,
        {
            "ours": _one(lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, None, targets)),
            "torch": _eager_loss,
            "liger": _liger("liger_fused_linear_cross_entropy", reduction="sum"),
        },
        _loss_cost,
        ({"features": 64, "vocabulary": 4096},),
        ({"features": 4096, "vocabulary": 128256},),
        products=True,
    ),
)
