"""The adapted linears, forward and backward, beside the formula in plain torch, PEFT and unsloth (LoRA only)."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from kernels import dequantize_4bit, dora_linear, lora_linear, quantize_4bit, weight_norm_sq
from kernels.bench.checks import as_accurate
from kernels.bench.nf4 import bnb_state, nf4_bytes
from kernels.bench.spec import DTYPES, OF_MODELS, RANKS, Bench, Inputs, Result, Unavailable, randn

SCALING = 2.0
BLOCKSIZE = 64


def _inputs(
    tokens: int,
    device: torch.device,
    *,
    magnitude: bool,
    dtype: str,
    base: str,
    in_features: int,
    out_features: int,
    rank: int,
) -> Inputs:
    """A frozen base weight, an adapter in fp32 that has learned something, x and the output's gradient."""

    def tensor(*shape: int, seed: int, of: torch.dtype = torch.float32) -> Tensor:
        return randn(*shape, seed=seed).to(device, of)

    compute = DTYPES[dtype]
    dense = tensor(out_features, in_features, seed=0, of=compute) / in_features**0.5
    weight, state = quantize_4bit(dense, BLOCKSIZE, double_quant=True) if base == "nf4" else (dense, None)
    adapter = {
        "lora_A": tensor(rank, in_features, seed=1) / in_features**0.5,
        "lora_B": tensor(out_features, rank, seed=2) / 10,
    }
    if magnitude:
        adapter["magnitude"] = 1 + tensor(out_features, seed=3) / 10
    return {
        "dense": dense,
        "weight": weight,
        "state": state,
        "adapter": adapter,
        "x": tensor(tokens, in_features, seed=4, of=compute),
        "dy": tensor(tokens, out_features, seed=5, of=compute),
    }


def _timed(forward: Callable[[], Tensor], leaves: dict[str, Tensor], dy: Tensor) -> Callable[[], Result]:
    """The function to time: forward and its backward, giving y and the gradient of every leaf."""

    def run() -> Result:
        y = forward()
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}

    return run


def _of_op(inputs: Inputs, op: Callable[..., Tensor]) -> Callable[[], Result]:
    """The function to time for op(x, lora_A, lora_B[, magnitude])."""
    leaves = {"x": inputs["x"]} | inputs["adapter"]
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}
    return _timed(lambda: op(**leaves), leaves, inputs["dy"])


def _lora(inputs: Inputs) -> Callable[[], Result]:
    return _of_op(inputs, partial(lora_linear, weight=inputs["weight"], quant_state=inputs["state"], scaling=SCALING))


def _dora(inputs: Inputs) -> Callable[[], Result]:
    weight, state = inputs["weight"], inputs["state"]
    norm_sq = weight_norm_sq(weight, state)
    return _of_op(inputs, partial(dora_linear, weight=weight, quant_state=state, norm_sq=norm_sq, scaling=SCALING))


def _torch(inputs: Inputs) -> Callable[[], Result]:
    """As the papers write it, in x's dtype. Forms W + sBA; keeps W, also a dequantized one, until backward."""

    def op(x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None = None) -> Tensor:
        w = inputs["dense"] if inputs["state"] is None else dequantize_4bit(inputs["weight"], inputs["state"])
        w = w.to(x.dtype)
        y = x @ w.t() + SCALING * (x @ lora_A.to(x.dtype).t()) @ lora_B.to(x.dtype).t()
        if magnitude is None:
            return y
        norm = (w.to(lora_A.dtype) + SCALING * lora_B @ lora_A).detach().norm(dim=1)
        return (magnitude / norm).to(x.dtype) * y

    return _of_op(inputs, op)


def _peft(inputs: Inputs) -> Callable[[], Result]:
    """PEFT's layer with its adapter in fp32, as PEFT makes it, under autocast, as transformers' Trainer runs it."""
    import peft

    dense, adapter, x = inputs["dense"], inputs["adapter"], inputs["x"].detach().clone().requires_grad_()
    out_features, in_features = dense.shape
    if inputs["state"] is None:
        linear = nn.Linear(in_features, out_features, bias=False, dtype=dense.dtype)
    else:
        from bitsandbytes.nn import Linear4bit

        linear = Linear4bit(in_features, out_features, bias=False, compute_dtype=dense.dtype, quant_type="nf4")
    linear.load_state_dict({"weight": dense.cpu()})
    rank = adapter["lora_A"].shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["0"], use_dora="magnitude" in adapter)
    model = peft.get_peft_model(nn.Sequential(linear).to(x.device), config)  # .to(device) quantizes a Linear4bit
    layer = model.base_model.model[0]
    parameters = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if "magnitude" in adapter:
        parameters["magnitude"] = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter[name])
    leaves = {"x": x} | parameters

    def forward() -> Tensor:
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            return model(x)

    return _timed(forward, leaves, inputs["dy"])


def _unsloth(inputs: Inputs) -> Callable[[], Result]:
    """unsloth's autograd function for one LoRA linear: torch products over bitsandbytes' dequantization."""
    if not inputs["x"].is_cuda:
        raise Unavailable("unsloth runs on GPUs only")
    from unsloth.kernels.fast_lora import LoRA_W

    weight, state = inputs["weight"], inputs["state"]
    if state is not None:
        weight, state = weight.view(-1, 1), bnb_state(state)

    def op(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return LoRA_W.apply(x.unsqueeze(0), weight, state, lora_A, lora_B, SCALING).squeeze(0)

    return _of_op(inputs, op)


def _check(inputs: Inputs) -> Callable[[Result], None]:
    precise = {name: inputs[name].double() for name in ("dense", "x", "dy")}
    precise["adapter"] = {name: tensor.double() for name, tensor in inputs["adapter"].items()}
    return as_accurate(_torch({**inputs, **precise})(), _torch(inputs)(), inputs["x"].dtype)


def _cost(
    tokens: int, *, magnitude: bool, dtype: str, base: str, in_features: int, out_features: int, rank: int
) -> tuple[int, int]:
    """Forward reads x, W, A, B and writes y; backward reads dy, x, W, A, B and writes dx, dA, dB; m, dm likewise."""
    weights, adapter = in_features * out_features, rank * (in_features + out_features)
    size = DTYPES[dtype].itemsize
    weight_bytes = nf4_bytes(weights, BLOCKSIZE, double_quant=True) if base == "nf4" else weights * size
    n_bytes = size * tokens * (3 * in_features + 2 * out_features) + 2 * weight_bytes + 3 * 4 * adapter
    flops = 4 * tokens * weights + 6 * tokens * adapter
    if magnitude:
        n_bytes += 3 * 4 * out_features
        flops += 2 * rank * weights + 2 * rank * adapter  # WAᵀ, AAᵀ and B(AAᵀ) of the norm
    return n_bytes, flops


def _bench(kernel: str, ours: Callable[[Inputs], Callable[[], Result]], magnitude: bool) -> Bench:
    shape = {"in_features": 576, "out_features": 1536, "rank": 16}  # the up projection of SmolLM2-135M
    return Bench(
        kernel=kernel,
        mode="forward+backward",
        unit="token",
        sizes=(128, 1024),
        quick_sizes=(8,),
        sizes_of_models=(512, 2048, 8192),
        configs_of_models=tuple(
            {"dtype": "bf16", "base": "nf4", "in_features": columns, "out_features": rows, "rank": rank}
            for (rows, columns), rank in product(OF_MODELS, RANKS)
        ),
        configs=tuple({"dtype": dtype, "base": base} | shape for base, dtype in product(("dense", "nf4"), DTYPES)),
        inputs=partial(_inputs, magnitude=magnitude),
        providers={"ours": ours, "torch": _torch, "peft": _peft} | ({} if magnitude else {"unsloth": _unsloth}),
        check=_check,
        cost=partial(_cost, magnitude=magnitude),
        products=True,
    )


BENCHES = (_bench("lora_linear", _lora, magnitude=False), _bench("dora_linear", _dora, magnitude=True))
