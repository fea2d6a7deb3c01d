"""Products with a frozen weight: over NF4 for few and many tokens, and both ways to compute a GEMM and its epilogue."""

from collections.abc import Callable
from itertools import product
from unittest.mock import patch

import torch

from kernels import dequantize_4bit, nf4_linear, quantize_4bit
from kernels.bench.checks import as_accurate
from kernels.bench.nf4 import bnb_state, nf4_bytes
from kernels.bench.spec import DTYPES, OF_MODELS, RANKS, Bench, Inputs, Result, randn
from kernels.triton.gemm import LIBRARY_FROM, gemm
from kernels.triton.low_rank import project
from kernels.triton.outer import outer

BLOCKSIZE = 64
DOWN_PROJECTION = (4096, 14336)  # (out, in) of Llama-3 8B: fewer rows and longer ones than in OF_MODELS


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


def _gemm_inputs(
    tokens: int, device: torch.device, dtype: str, in_features: int, out_features: int, rank: int
) -> Inputs:
    def tensor(*shape: int, seed: int) -> torch.Tensor:
        return (randn(*shape, seed=seed) / shape[-1] ** 0.5).to(device, DTYPES[dtype])

    shapes = {"x": (tokens, in_features), "w": (out_features, in_features)}
    shapes |= {"s": (tokens, rank), "lora_B": (out_features, rank), "dy": (tokens, out_features)}
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


def _gemm_cost(tokens: int, dtype: str, in_features: int, out_features: int, rank: int) -> tuple[int, int]:
    elements = tokens * (in_features + out_features) + in_features * out_features + rank * (tokens + out_features)
    return DTYPES[dtype].itemsize * elements, 2 * tokens * out_features * (in_features + rank)


def _thin(op: Callable[[Inputs], Result]) -> Callable[[Inputs], Callable[[], Result]]:
    return lambda inputs: lambda: op(inputs)


def _check_thin(op: Callable[[Inputs], Result]) -> Callable[[Inputs], Callable[[Result], None]]:
    def check(inputs: Inputs) -> Callable[[Result], None]:
        exact = op({name: tensor.double() for name, tensor in inputs.items()})
        return as_accurate(exact, op(inputs), inputs["x"].dtype)

    return check


def _project_in_torch(inputs: Inputs) -> Result:
    return {"dxa": inputs["dy"] @ inputs["lora_B"]}


def _outer_in_torch(inputs: Inputs) -> Result:
    return {"dA": inputs["s"].t() @ inputs["x"], "dB": inputs["dy"].t() @ inputs["s"]}


def _project(inputs: Inputs) -> Result:
    return {"dxa": project(inputs["dy"], inputs["lora_B"], 1.0)}


def _outer(inputs: Inputs) -> Result:
    dtypes = (inputs["x"].dtype,) * 2
    return dict(zip(("dA", "dB"), outer(inputs["x"], inputs["s"], inputs["dy"], inputs["s"], dtypes)))


def _project_cost(tokens: int, dtype: str, in_features: int, out_features: int, rank: int) -> tuple[int, int]:
    elements = tokens * (out_features + rank) + out_features * rank
    return DTYPES[dtype].itemsize * elements, 2 * tokens * out_features * rank


def _outer_cost(tokens: int, dtype: str, in_features: int, out_features: int, rank: int) -> tuple[int, int]:
    columns = in_features + out_features
    return DTYPES[dtype].itemsize * (tokens * (columns + 2 * rank) + columns * rank), 2 * tokens * columns * rank


def _of_adapter(kernel: str, providers, check, cost, sizes: tuple[int, ...]) -> Bench:
    return Bench(
        kernel=kernel,
        mode="forward",
        unit="token",
        sizes=sizes,
        quick_sizes=(8,),
        configs=tuple(
            {"dtype": "bf16", "in_features": columns, "out_features": rows, "rank": rank}
            for (rows, columns), rank in product(OF_MODELS, RANKS)
        ),
        inputs=_gemm_inputs,
        providers=providers,
        check=check,
        cost=cost,
        products=True,
        gpu_only=True,
    )


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
        sizes_of_models=(1, 4, 16, 64, 512, 2048),
        configs_of_models=tuple(
            {"dtype": "bf16", "in_features": columns, "out_features": rows}
            for rows, columns in (*OF_MODELS, DOWN_PROJECTION)
        ),
    ),
    _of_adapter(
        *("gemm", {"ours": _gemm(library=False), "library": _gemm(library=True)}, _check_gemm, _gemm_cost),
        sizes=(128, 512, 2048, 8192),
    ),
    _of_adapter(
        *("project", {"ours": _thin(_project), "torch": _thin(_project_in_torch)}),
        *(_check_thin(_project_in_torch), _project_cost),
        sizes=(512, 2048, 8192),
    ),
    _of_adapter(
        *("outer", {"ours": _thin(_outer), "torch": _thin(_outer_in_torch)}),
        *(_check_thin(_outer_in_torch), _outer_cost),
        sizes=(512, 2048, 8192),
    ),
)
