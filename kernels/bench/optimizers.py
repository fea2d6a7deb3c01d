"""AdamW with fp32 and with 8-bit state beside torch and bitsandbytes, in the middle of a run, over many tensors.

Every tensor is a part of one flat buffer, so that a result is there without a copy. Weight decay is 0: bitsandbytes'
GPU kernel decays after the update, all others before it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import adamw, adamw8bit
from kernels.adamw8bit import BLOCKSIZE
from kernels.bench.checks import as_accurate
from kernels.bench.spec import Bench, Inputs, Result, randn
from kernels.codebook import dynamic_map
from kernels.reference.adamw8bit import dequantize_state, quantize_state

HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
STEP = 10
_FP32 = ("exp_avg", "exp_avg_sq")
_8BIT = (*_FP32, "exp_avg_absmax", "exp_avg_sq_absmax")


def _fp32(size: int, device: torch.device, dtype: str, tensors: int) -> Inputs:
    p, g, m, v = (randn(size, seed=seed) * scale for seed, scale in enumerate((1.0, 0.01, 0.01, 0.01)))
    flat = {"params": p, "grads": g, "exp_avg": m, "exp_avg_sq": v.square()}
    return {name: tensor.to(device) for name, tensor in flat.items()} | {"tensors": tensors}


def _8bit(size: int, device: torch.device, dtype: str, tensors: int) -> Inputs:
    inputs = dict(_fp32(size, device, dtype, tensors))
    for name in _FP32:
        inputs[name], inputs[f"{name}_absmax"] = quantize_state(inputs[name], name == "exp_avg")
    return inputs


def _copies(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """(flat copies, which a step changes; each of them as a list of tensors)"""
    flat = {name: tensor.clone() for name, tensor in inputs.items() if name != "tensors"}
    return flat, {name: list(tensor.view(inputs["tensors"], -1)) for name, tensor in flat.items()}


def _ours(op: Callable, names: tuple[str, ...]) -> Callable[[Inputs], Callable[[], Result]]:
    def provider(inputs: Inputs) -> Callable[[], Result]:
        flat, lists = _copies(inputs)
        result = {name: flat[name] for name in ("params", *names)}

        def run() -> Result:
            op(lists["params"], lists["grads"], *(lists[name] for name in names), **HYPER, step=STEP)
            return result

        return run

    return provider


def _optimizer(make: Callable, names: dict[str, str]) -> Callable[[Inputs], Callable[[], Result]]:
    """A torch optimizer made by `make`; `names` has its name of each state tensor."""

    def provider(inputs: Inputs) -> Callable[[], Result]:
        flat, lists = _copies(inputs)
        parameters = [torch.nn.Parameter(p) for p in lists["params"]]
        for p, grad in zip(parameters, lists["grads"]):
            p.grad = grad
        optimizer, step, more = make(parameters)
        for i, p in enumerate(parameters):
            optimizer.state[p] = {theirs: lists[ours][i] for ours, theirs in names.items()} | {"step": step()} | more
        result = {name: flat[name] for name in ("params", *names)}

        def run() -> Result:
            optimizer.step()
            return result

        return run

    return provider


def _torch(parameters: list[torch.nn.Parameter]) -> tuple:
    optimizer = torch.optim.AdamW(parameters, **HYPER, fused=True)
    return optimizer, lambda: torch.tensor(STEP - 1.0, device=parameters[0].device), {}


def _bnb(parameters: list[torch.nn.Parameter]) -> tuple:
    from bitsandbytes.optim import AdamW32bit

    optimizer = AdamW32bit(parameters, **HYPER)
    optimizer.initialized = True  # its state is put there
    return optimizer, lambda: STEP - 1, {}


def _bnb8bit(parameters: list[torch.nn.Parameter]) -> tuple:
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(parameters, **HYPER, min_8bit_size=0)
    optimizer.initialized = True
    device = parameters[0].device
    return optimizer, lambda: STEP - 1, {"qmap1": dynamic_map(device), "qmap2": dynamic_map(device, False)}


def _step(inputs: Inputs, m: Tensor, v: Tensor, dtype: torch.dtype) -> Result:
    """The formula in plain torch."""
    (beta1, beta2), lr = HYPER["betas"], HYPER["lr"]
    p, g, m, v = (t.to(dtype) for t in (inputs["params"], inputs["grads"], m, v))
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**STEP)).sqrt() + HYPER["eps"]
    return {"params": p - lr / (1 - beta1**STEP) * m / denominator, "exp_avg": m, "exp_avg_sq": v}


def _check_fp32(inputs: Inputs) -> Callable[[Result], None]:
    state = inputs["exp_avg"], inputs["exp_avg_sq"]
    return as_accurate(_step(inputs, *state, torch.float64), _step(inputs, *state, torch.float32), torch.float32)


def _check_8bit(inputs: Inputs) -> Callable[[Result], None]:
    """Parameters as accurate as torch's; states within half a step of the map from the exact ones, and the 1/65535 of
    absmax that bitsandbytes' CPU library rounds to."""
    state = [dequantize_state(inputs[name], inputs[f"{name}_absmax"], name == "exp_avg") for name in _FP32]
    exact = _step(inputs, *state, torch.float64)
    by_torch = _step(inputs, *state, torch.float32)
    check_params = as_accurate({"params": exact["params"]}, {"params": by_torch["params"]}, torch.float32)

    def check(got: Result) -> None:
        check_params({"params": got["params"]})
        for name in _FP32:
            signed, absmax = name == "exp_avg", got[f"{name}_absmax"]
            error = (dequantize_state(got[name], absmax, signed) - exact[name]).abs()
            levels = dynamic_map(absmax.device, signed)
            gaps = torch.cat([levels.new_zeros(1), levels.diff(), levels.new_zeros(1)])
            if signed:
                gaps[0] = 2 * (1 + levels[0])  # below the lowest value, which is not -1
            half = torch.maximum(gaps[:-1], gaps[1:])[got[name].int()] / 2
            allowed = (half + 1 / 65535 + 1e-6) * absmax.repeat_interleave(BLOCKSIZE)
            assert (error <= allowed).all(), f"{name}: {(error > allowed).sum():,} of {len(error):,} states are wrong"

    return check


_BOTH = {"mode": "forward", "unit": "weight", "sizes": (2**18, 2**22), "quick_sizes": (2**13,)}
_CONFIGS = tuple({"dtype": "fp32", "tensors": tensors} for tensors in (1, 32))

BENCHES = (
    Bench(
        kernel="adamw",
        **_BOTH,
        configs=_CONFIGS,
        inputs=_fp32,
        providers={
            "ours": _ours(adamw, _FP32),
            "torch": _optimizer(_torch, dict(zip(_FP32, _FP32))),
            "bitsandbytes": _optimizer(_bnb, dict(zip(_FP32, ("state1", "state2")))),
        },
        check=_check_fp32,
        cost=lambda size, dtype, tensors: (28 * size, 14 * size),
    ),
    Bench(
        kernel="adamw8bit",
        **_BOTH,
        configs=_CONFIGS,
        inputs=_8bit,
        providers={
            "ours": _ours(adamw8bit, _8BIT),
            "bitsandbytes": _optimizer(_bnb8bit, dict(zip(_8BIT, ("state1", "state2", "absmax1", "absmax2")))),
        },
        check=_check_8bit,
        cost=lambda size, dtype, tensors: (16 * size + 16 * size // BLOCKSIZE, 18 * size),
    ),
)
