"""The DoRA norm ‖W + sBA‖ beside the formula in plain torch and PEFT's."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from kernels import dequantize_4bit, dora_norm, quantize_4bit, weight_norm_sq
from kernels.bench.checks import as_accurate
from kernels.bench.nf4 import nf4_bytes
from kernels.bench.spec import DTYPES, Bench, Inputs, Result, randn

SCALING = 2.0
BLOCKSIZE = 64


def _inputs(rows: int, device: torch.device, dtype: str, base: str, columns: int, rank: int) -> Inputs:
    dense = (randn(rows, columns, seed=0) / columns**0.5).to(device, DTYPES[dtype])
    weight, state = quantize_4bit(dense, BLOCKSIZE, double_quant=True) if base == "nf4" else (dense, None)
    return {
        "dtype": dtype,
        "weight": weight,
        "state": state,
        "lora_A": randn(rank, columns, seed=1).to(device) / columns**0.5,
        "lora_B": randn(rows, rank, seed=2).to(device) / 10,
    }


def _dense(inputs: Inputs) -> Tensor:
    state = inputs["state"]
    return inputs["weight"] if state is None else dequantize_4bit(inputs["weight"], state)


def _ours(inputs: Inputs) -> Callable[[], Result]:
    weight, state = inputs["weight"], inputs["state"]
    norm_sq = weight_norm_sq(weight, state)
    return lambda: {"norm": dora_norm(weight, norm_sq, inputs["lora_A"], inputs["lora_B"], SCALING, state)}


def _torch(inputs: Inputs) -> Callable[[], Result]:
    def run() -> Result:
        return {"norm": (_dense(inputs).float() + SCALING * inputs["lora_B"] @ inputs["lora_A"]).norm(dim=1)}

    return run


def _peft(inputs: Inputs) -> Callable[[], Result]:
    """As PEFT's forward calls it: BA is formed from the identity, W is dequantized, then the norm."""
    from peft.tuners.lora.dora import DoraLinearLayer

    layer = DoraLinearLayer(fan_in_fan_out=False)
    rank, columns = inputs["lora_A"].shape
    a = nn.Linear(columns, rank, bias=False, device=inputs["lora_A"].device)
    b = nn.Linear(rank, inputs["lora_B"].shape[0], bias=False, device=inputs["lora_A"].device)
    a.weight.data, b.weight.data = inputs["lora_A"], inputs["lora_B"]

    @torch.no_grad()
    def run() -> Result:
        identity = torch.eye(columns, device=a.weight.device)
        return {"norm": layer.get_weight_norm(_dense(inputs).float(), b(a(identity)).T, SCALING)}

    return run


def _check(inputs: Inputs) -> Callable[[Result], None]:
    w = _dense(inputs).double() + SCALING * inputs["lora_B"].double() @ inputs["lora_A"].double()
    return as_accurate({"norm": w.norm(dim=1)}, _torch(inputs)(), DTYPES[inputs["dtype"]])


def _cost(rows: int, dtype: str, base: str, columns: int, rank: int) -> tuple[int, int]:
    """W, A and B are read, the norm is written; WAᵀ, AAᵀ and B(AAᵀ)."""
    weights = rows * columns
    size = nf4_bytes(weights, BLOCKSIZE, double_quant=True) if base == "nf4" else weights * DTYPES[dtype].itemsize
    return size + 4 * rank * (rows + columns) + 4 * rows, 2 * rank * (weights + rank * (rows + columns))


BENCHES = (
    Bench(
        kernel="dora_norm",
        mode="forward",
        unit="row",
        sizes=(576, 1536, 4096),
        quick_sizes=(16,),
        configs=tuple(
            {"dtype": dtype, "base": base, "columns": 1024, "rank": rank}
            for base, dtype, rank in product(("dense", "nf4"), DTYPES, (16, 64))
        ),
        inputs=_inputs,
        providers={"ours": _ours, "torch": _torch, "peft": _peft},
        check=_check,
        cost=_cost,
        products=True,
    ),
)
