"""Double quantization of absmax beside bitsandbytes, byte for byte."""

from collections.abc import Callable

import torch

from kernels import dequantize_absmax, quantize_absmax
from kernels.bench.checks import as_the_reference
from kernels.bench.spec import Bench, Inputs, Result, randn
from kernels.codebook import NESTED_BLOCKSIZE, dynamic_map
from kernels.weight import nested_blocks


def _absmax(size: int, device: torch.device, dtype: str) -> Inputs:
    return {"absmax": randn(size, seed=0).abs().to(device)}


def _codes(size: int, device: torch.device, dtype: str) -> Inputs:
    return dict(zip(("codes", "nested_absmax", "nested_offset"), quantize_absmax(**_absmax(size, device, dtype))))


def _quantize(inputs: Inputs) -> Callable[[], Result]:
    return lambda: dict(zip(("codes", "nested_absmax", "nested_offset"), quantize_absmax(**inputs)))


def _bnb_quantize(inputs: Inputs) -> Callable[[], Result]:
    from bitsandbytes.functional import quantize_blockwise

    def run() -> Result:
        offset = inputs["absmax"].mean()
        codes, state = quantize_blockwise(inputs["absmax"] - offset, blocksize=NESTED_BLOCKSIZE)
        return {"codes": codes, "nested_absmax": state.absmax, "nested_offset": offset}

    return run


def _dequantize(inputs: Inputs) -> Callable[[], Result]:
    return lambda: {"absmax": dequantize_absmax(**inputs)}


def _bnb_dequantize(inputs: Inputs) -> Callable[[], Result]:
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    code = dynamic_map(inputs["codes"].device)
    state = QuantState(inputs["nested_absmax"], blocksize=NESTED_BLOCKSIZE, code=code, dtype=torch.float32)
    return lambda: {"absmax": dequantize_blockwise(inputs["codes"], state) + inputs["nested_offset"]}


def _bench(kernel: str, inputs: Callable, ours: Callable, theirs: Callable) -> Bench:
    return Bench(
        kernel=kernel,
        mode="forward",
        unit="block",
        sizes=(2**14, 2**18, 2**22),
        quick_sizes=(2**10,),
        configs=({"dtype": "fp32"},),
        inputs=inputs,
        providers={"ours": ours, "bitsandbytes": theirs},
        check=as_the_reference(ours),
        cost=lambda size, dtype: (size * 5 + nested_blocks(size) * 4 + 4, 2 * size),
    )


BENCHES = (
    _bench("absmax_quantize", _absmax, _quantize, _bnb_quantize),
    _bench("absmax_dequantize", _codes, _dequantize, _bnb_dequantize),
)
