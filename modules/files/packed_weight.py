"""One packed weight as bitsandbytes writes it: n values [out, in] in blocks, as the tensors

<linear>.weight                      the codes: uint8 [ceil(n / 2), 1], or the same bytes as another dtype
<linear>.weight.absmax               fp32 [blocks]; with double quantization uint8 [blocks]
<linear>.weight.quant_map            fp32 [16]: the levels of the data type
<linear>.weight.nested_absmax        fp32 [ceil(blocks / 256)]   } only with double
<linear>.weight.nested_quant_map     fp32 [256]: the 8-bit map   } quantization
<linear>.weight.quant_state.bitsandbytes__nf4 or …__fp4
                                     uint8: JSON of quant_type, blocksize, dtype and shape; with double
                                     quantization also nested_blocksize, nested_dtype, nested_offset
"""

import json
import math

import torch
from torch import Tensor

from kernels import QuantState, Weight
from kernels.codebook import (
    BLOCK_FORMATS,
    BLOCKSIZES,
    NESTED_BLOCKSIZE,
    absmax_map,
    levels,
    quant_types,
)
from kernels.weight import FLOATS, nested_blocks, packed_sizes
from modules.files.tensors import TensorFiles, describe

QUANT_STATE = "quant_state.bitsandbytes__"  # the name of the data type follows


def is_packed(files: TensorFiles, weight: str) -> bool:
    """True if `files` hold any tensor of a packed weight called `weight`. Then they must hold all of them."""
    if any(name.startswith(f"{weight}.") for name in files):
        return True
    return weight in files and not files.tensor(weight).is_floating_point()


def read_packed(files: TensorFiles, weight: str, shape: torch.Size, quant_type: str) -> Weight:
    """The packed weight called `weight`. Its tensors are copied as they are and never unpacked.

    Args:
        shape: [out, in], the model's; of experts [experts, out, in].
        quant_type: the data type, one of `kernels.codebook.quant_types()`.

    Raises:
        ValueError: a tensor is missing, or does not fit the others or the model.
    """
    for other in quant_types():
        if other != quant_type and f"{weight}.{QUANT_STATE}{other}" in files:
            raise ValueError(f"{files.path(weight)}: {weight} is packed in {other}, not in {quant_type}")
    state = _read_quant_state(files, weight, shape, quant_type)
    nested = "nested_blocksize" in state or f"{weight}.nested_absmax" in files
    n_bytes, blocks = packed_sizes(shape.numel(), state["blocksize"])
    codes = files.read(weight)
    if codes.numel() * codes.element_size() != n_bytes or not codes.is_contiguous():
        raise ValueError(
            f"{files.path(weight)}: {weight} is {describe(codes.dtype, codes.shape)}; "
            f"the codes of a weight {list(shape)} are {n_bytes} bytes"
        )
    _check_map(files, f"{weight}.quant_map", levels(quant_type))
    absmax = files.read(f"{weight}.absmax", torch.uint8 if nested else torch.float32, (blocks,))
    nested_absmax = nested_offset = None
    if nested:
        _check_map(files, f"{weight}.nested_quant_map", absmax_map(quant_type))
        nested_absmax = files.read(f"{weight}.nested_absmax", torch.float32, (nested_blocks(blocks),))
        nested_offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
    dtype = getattr(torch, state["dtype"])
    quant_state = QuantState(absmax, shape, dtype, state["blocksize"], nested_absmax, nested_offset, quant_type)
    return Weight(codes.view(-1).view(torch.uint8), quant_state)


def _check_map(files: TensorFiles, name: str, expected: Tensor) -> None:
    found = files.read(name, torch.float32, expected.shape)
    # bitsandbytes computes the 8-bit map on each machine, and the last bits may differ between machines.
    if not torch.allclose(found, expected, rtol=1e-6, atol=0, equal_nan=True):
        raise ValueError(f"{files.path(name)}: {name} does not hold bitsandbytes' values")


def _read_quant_state(files: TensorFiles, weight: str, shape: torch.Size, quant_type: str) -> dict:
    """The JSON of a packed weight, checked."""
    name = f"{weight}.{QUANT_STATE}{quant_type}"
    raw = files.read(name, torch.uint8)
    try:
        state = json.loads(raw.numpy().tobytes())
    except ValueError as error:
        raise ValueError(f"{files.path(name)}: {name} is not JSON: {error}") from error

    def check(key: str, allowed: bool, expected: str) -> None:
        if not allowed:
            raise ValueError(f"{files.path(name)}: {name} has {key}={state.get(key)!r}; it must be {expected}")

    floats = [str(dtype).removeprefix("torch.") for dtype in FLOATS]
    check("quant_type", state.get("quant_type") == quant_type, quant_type)
    sizes = (BLOCK_FORMATS[quant_type].blocksize,) if quant_type in BLOCK_FORMATS else BLOCKSIZES
    check("blocksize", state.get("blocksize") in sizes, f"one of {', '.join(map(str, sizes))}")
    check("dtype", state.get("dtype") in floats, f"one of {', '.join(floats)}")
    check("shape", state.get("shape") == list(shape), f"{list(shape)}, the model's")
    nested = any(key.startswith("nested_") for key in state) or f"{weight}.nested_absmax" in files
    if nested or quant_type in BLOCK_FORMATS:
        check("nested_blocksize", state.get("nested_blocksize") == NESTED_BLOCKSIZE, str(NESTED_BLOCKSIZE))
        check("nested_dtype", state.get("nested_dtype") == "float32", "float32")
        offset = state.get("nested_offset")
        check("nested_offset", isinstance(offset, float | int) and math.isfinite(offset), "a finite number")
    return state


def packed_tensors(weight: Weight) -> dict[str, Tensor]:
    """The tensors of a packed weight, by bitsandbytes' names without the linear's: `weight`, `weight.absmax`, …

    Tensors that are the same for all weights are copied, because safetensors refuses shared memory.
    """
    quant_state = weight.quant_state
    state = {
        "quant_type": quant_state.quant_type,
        "blocksize": quant_state.blocksize,
        "dtype": str(quant_state.dtype).removeprefix("torch."),
        "shape": list(quant_state.shape),
    }
    tensors = {
        "weight": weight.values.view(-1, 1),
        "weight.absmax": quant_state.absmax,
        "weight.quant_map": levels(quant_state.quant_type).clone(),
    }
    if quant_state.nested:
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": quant_state.nested_offset.item(),
        }
        tensors["weight.nested_absmax"] = quant_state.nested_absmax
        tensors["weight.nested_quant_map"] = absmax_map(quant_state.quant_type).clone()
    as_json = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.{QUANT_STATE}{quant_state.quant_type}"] = as_json
    return tensors
