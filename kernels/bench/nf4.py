"""NF4 quantize and dequantize beside bitsandbytes, byte for byte."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from kernels import QuantState, dequantize_4bit, quantize_4bit
from kernels.bench.checks import as_the_reference
from kernels.bench.spec import DTYPES, Bench, Inputs, Result, Unavailable, randn
from kernels.codebook import NESTED_BLOCKSIZE, dynamic_map, levels
from kernels.weight import nested_blocks, packed_sizes


def _weights(size: int, device: torch.device, dtype: str, blocksize: int, double_quant: bool) -> Inputs:
    w = randn(size, seed=0).to(device, DTYPES[dtype])
    return {"w": w, "blocksize": blocksize, "double_quant": double_quant}


def _packed(size: int, device: torch.device, dtype: str, blocksize: int, double_quant: bool) -> Inputs:
    packed, state = quantize_4bit(randn(size, seed=0).to(device, DTYPES[dtype]), blocksize, double_quant)
    return {"packed": packed, "state": state}


def _named(packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Result:
    nested = {} if nested_absmax is None else {"nested_absmax": nested_absmax, "nested_offset": nested_offset}
    return {"packed": packed, "absmax": absmax} | nested


def _quantize(inputs: Inputs) -> Callable[[], Result]:
    def run() -> Result:
        packed, state = quantize_4bit(**inputs)
        return _named(packed, state.absmax, state.nested_absmax, state.nested_offset)

    return run


def _bnb_quantize(inputs: Inputs) -> Callable[[], Result]:
    from bitsandbytes.functional import quantize_4bit

    def run() -> Result:
        packed, state = quantize_4bit(
            inputs["w"],
            blocksize=inputs["blocksize"],
            compress_statistics=inputs["double_quant"],
            quant_type="nf4",
        )
        return _named(packed.view(-1), state.absmax, state.state2.absmax if state.nested else None, state.offset)

    return run


def _dequantize(inputs: Inputs) -> Callable[[], Result]:
    return lambda: {"w": dequantize_4bit(inputs["packed"], inputs["state"])}


def bnb_state(ours: QuantState):
    """bitsandbytes' QuantState of the same tensors."""
    from bitsandbytes.functional import QuantState as BnbState

    device = ours.absmax.device
    nested = {}
    if ours.nested:
        constants = BnbState(ours.nested_absmax, blocksize=NESTED_BLOCKSIZE, code=dynamic_map(device))
        constants.dtype = torch.float32
        nested = {"offset": ours.nested_offset, "state2": constants}
    return BnbState(
        ours.absmax, ours.shape, levels("nf4", device), ours.blocksize, quant_type="nf4", dtype=ours.dtype, **nested
    )


def _bnb_dequantize(inputs: Inputs) -> Callable[[], Result]:
    from bitsandbytes.functional import dequantize_4bit

    state, packed = bnb_state(inputs["state"]), inputs["packed"].view(-1, 1)
    return lambda: {"w": dequantize_4bit(packed, state)}


def _unsloth_dequantize(inputs: Inputs) -> Callable[[], Result]:
    """bitsandbytes' kernels without its Python."""
    if not inputs["packed"].is_cuda:
        raise Unavailable("unsloth runs on GPUs only")
    from unsloth.kernels.utils import fast_dequantize

    state, packed = bnb_state(inputs["state"]), inputs["packed"].view(-1, 1)
    if not state.nested:
        raise Unavailable("unsloth dequantizes double quantization only")
    return lambda: {"w": fast_dequantize(packed, state)}


def nf4_bytes(size: int, blocksize: int, double_quant: bool) -> int:
    """Bytes of the codes and constants of `size` weights."""
    n_bytes, blocks = packed_sizes(size, blocksize)
    return n_bytes + (blocks + 4 * nested_blocks(blocks) + 4 if double_quant else 4 * blocks)


def _cost(size: int, dtype: str, blocksize: int, double_quant: bool) -> tuple[int, int]:
    """Dense values one way, codes and constants the other; one multiplication a weight."""
    return size * DTYPES[dtype].itemsize + nf4_bytes(size, blocksize, double_quant), size


_SIZES = {"sizes": (2**16, 2**20, 2**24), "quick_sizes": (2**12,)}
_CONFIGS = tuple(
    {"dtype": dtype, "blocksize": 64, "double_quant": double} for dtype, double in product(DTYPES, (False, True))
)

BENCHES = (
    Bench(
        kernel="nf4_quantize",
        mode="forward",
        unit="weight",
        **_SIZES,
        configs=_CONFIGS,
        inputs=_weights,
        providers={"ours": _quantize, "bitsandbytes": _bnb_quantize},
        check=as_the_reference(_quantize),
        cost=_cost,
    ),
    Bench(
        kernel="nf4_dequantize",
        mode="forward",
        unit="weight",
        **_SIZES,
        configs=_CONFIGS,
        inputs=_packed,
        providers={"ours": _dequantize, "bitsandbytes": _bnb_dequantize, "unsloth": _unsloth_dequantize},
        check=as_the_reference(_dequantize),
        cost=_cost,
    ),
)
