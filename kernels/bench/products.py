"""Products with a frozen weight: over NF4 for few and many tokens, and both ways to compute a GEMM and its epilogue."""

from collections.abc import Callable
from itertools import product
from unittest.mock import patch

import torch

from kernels import dequantize_4bit, nf4_linear, quantize_4bit
from kernels.bench.checks import as_accurate
from kernels.bench.nf4 import bnb_state, nf4_bytes
from kernels.bench.spec import DTYPES, Bench, Inputs, Result, randn
from kernels.triton.gemm import LIBRARY_FROM, gemm

BLOCKSIZE = 64


def _nf4_inputs(tokens: int, device: torch.device, dtype: str, in_features: int, out_features: int) -> Inputs:
    dense = (randn(out_features, in_features, seed=0) / in_features**0.5).to(device, DTYPES[dtype])
    packed, state = quantize_4bit(dense, BLOCKSIZE, double_quant=True)
    return {"packed": packed, "state": state, "x": randn(tokens, in_features, seed=1).to(device, DTYPES[dtype])}


def _nf4_linear(inputs: Inputs) -> Callable[[], Result]:
    return lambda: {"y": nf4_linear(inputs["x"], inputs["packed"], inputs["state"])}


def _dequantize_and_multiply(inputs: Inputs) -> Callable[[], Result]:
    return lambda: {"y": inputs["x"] @ dequantize_4bit(inputs["packed"], inputs["state"]).t()}


def _bnb_matmul(inputs: Inputs) -> Callable[[], Result]:
    import bitsandbytes

    packed, state = inputs["packed"].view(-1, 1), bnb_state(inputs["state"])
    return lambda: {"y": bitsandbytes.matmul_4bit(inputs["x"], packed.t(), quant_state=state)}


def _check_nf4(inputs: Inputs) -> Callable[[Result], None]:
    w = dequantize_4bit(inputs["packed"], inputs["state"])
    exact = {"y": inputs["x"].double() @ w.double().t()}
    return as_accurate(exact, {"y": inputs["x"] @ w.t()}, inputs["x"].dtype)


def _nf4_cost(tokens: int, dtype: str, in_features: int, out_features: int) -> tuple[int, int]:
    weights, size = in_features * out_features, DTYPES[dtype].itemsize
    n_bytes = nf4_bytes(weights, BLOCKSIZE, double_quant=True) + size * tokens * (in_features + out_features)
    return n_bytes, 2 * tokens * weights


def _gemm_inputs(tokens: int, device: torch.device, dtype: str, features: int, rank: int) -> Inputs:
    def tensor(*shape: int, seed: int) -> torch.Tensor:
        return (randn(*shape, seed=seed) / shape[-1] ** 0.5).to(device, DTYPES[dtype])

    shapes = {"x": (tokens, features), "w": (features, features), "s": (tokens, rank), "lora_B": (features, rank)}
    return {name: tensor(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def _gemm(library: bool) -> Callable[[Inputs], Callable[[], Result]]:
    """The product with its epilogue, by the library followed by our epilogue, or all by our kernel."""
    choice = dict.fromkeys(LIBRARY_FROM, 0 if library else float("inf"))

    def provider(inputs: Inputs) -> Callable[[], Result]:
        w, v = inputs["w"].t(), inputs["lora_B"].t()

        def run() -> Result:
            with patch.dict(LIBRARY_FROM, choice):
                return {"y": gemm(inputs["x"], w, inputs["s"], v)[0]}

        return run

    return provider


def _torch_gemm(inputs: Inputs) -> Result:
    return {"y": inputs["x"] @ inputs["w"].t() + inputs["s"] @ inputs["lora_B"].t()}


def _check_gemm(inputs: Inputs) -> Callable[[Result], None]:
    exact = _torch_gemm({name: tensor.double() for name, tensor in inputs.items()})
    return as_accurate(exact, _torch_gemm(inputs), inputs["x"].dtype)


def _gemm_cost(tokens: int, dtype: str, features: int, rank: int) -> tuple[int, int]:
    elements = 2 * tokens * features + features**2 + rank * (tokens + features)
    return DTYPES[dtype].itemsize * elements, 2 * tokens * features * (features + rank)


BENCHES = (
    Bench(
        kernel="nf4_linear",
        mode="forward",
        unit="token",
        sizes=(1, 16, 64, 1024),
        quick_sizes=(2,),
        configs=tuple({"dtype": dtype, "in_features": 576, "out_features": 1536} for dtype in DTYPES),
        inputs=_nf4_inputs,
        providers={"ours": _nf4_linear, "torch": _dequantize_and_multiply, "bitsandbytes": _bnb_matmul},
        check=_check_nf4,
        cost=_nf4_cost,
        products=True,
    ),
    Bench(
        kernel="gemm",
        mode="forward",
        unit="token",
        sizes=(128, 512, 1024, 2048, 4096, 8192, 16384),
        quick_sizes=(8,),
        configs=tuple(
            {"dtype": "bf16", "features": features, "rank": rank} for features, rank in product((1024, 4096), (16, 64))
        ),
        inputs=_gemm_inputs,
        providers={"ours": _gemm(library=False), "library": _gemm(library=True)},
        check=_check_gemm,
        cost=_gemm_cost,
        products=True,
        gpu_only=True,
    ),
)
