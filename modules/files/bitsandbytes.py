"""Models on disk as transformers and bitsandbytes save them in 4 bits, in and out; neither needs bitsandbytes.

A packed linear [out, in] of n weights in blocks is

    <linear>.weight                      the codes: uint8 [ceil(n / 2), 1], or the same bytes as another dtype
    <linear>.weight.absmax               fp32 [blocks], or with double quantization uint8 [blocks]
    <linear>.weight.quant_map            fp32 [16]: the levels of NF4 or FP4
    <linear>.weight.nested_absmax        fp32 [ceil(blocks / 256)]   } with double
    <linear>.weight.nested_quant_map     fp32 [256]: the 8-bit map   } quantization
    <linear>.weight.quant_state.bitsandbytes__nf4 or …__fp4
                                         uint8: JSON of quant_type, blocksize, dtype, shape and, with double
                                         quantization, nested_blocksize, nested_dtype, nested_offset

and everything else is as in a dense model's directory; config.json has a `quantization_config`.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kernels import QuantState
from kernels.codebook import BITSANDBYTES_TYPES, BLOCKSIZES, NESTED_BLOCKSIZE, dynamic_map, levels
from kernels.double_quant import nested_blocks
from kernels.quant_state import FLOATS, packed_sizes
from modules.adapters.state import replace_module, state_of
from modules.adapters.targets import wrapped_linears
from modules.files.tensors import TensorFiles, describe
from modules.linear import NF4Linear

QUANT_STATE = "quant_state.bitsandbytes__"  # and the data type
ROTARY = r"rotary_emb\.inv_freq$"  # computed from the config; files of old transformers hold it all the same


def quantization_of(directory: str | Path) -> dict | None:
    """The `quantization_config` of a model directory's config.json; None if its weights are dense.

    Raises:
        ValueError: no readable config.json.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return config.get("quantization_config")


def load_bnb4(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model that transformers and bitsandbytes, or `save_bnb4`, saved in NF4 or FP4 to `directory`.

    Codes and constants go from the memory-mapped files into `NF4Linear`s as they are; no dense weight of a packed
    linear is ever made.

    Args:
        dtype: of everything that is not packed, and to compute in; by default what the files say.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        ValueError: not in NF4 or FP4, or a tensor that is missing, damaged or does not fit the model; it is named.
    """
    directory = Path(directory)
    quant_type = _quant_type(directory)
    files = TensorFiles(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{directory}: {error}") from error
    del config.quantization_config  # transformers would see its own quantizer's work in the model
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _is_packed(files, f"{name}.weight")
    }
    if not packed:
        raise ValueError(f"{directory}: config.json says load_in_4bit, but no linear of the model is packed")
    _load_dense(model, files, {f"{name}.weight" for name in packed})
    for name, module in packed.items():
        shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        codes, quant_state = _read_packed(files, f"{name}.weight", shape, quant_type)
        linear = NF4Linear(codes, quant_state, module.bias, conv1d=isinstance(module, Conv1D))
        replace_module(model, name, linear if dtype is None else linear.to(dtype))
    expected_leftovers = [*(model._keys_to_ignore_on_load_unexpected or ()), ROTARY]
    for name in sorted(files.unread()):
        if not any(re.search(pattern, name) for pattern in expected_leftovers):
            raise ValueError(f"{files.path(name)}: {name} belongs to no tensor of {type(model).__name__}")
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval()


def save_bnb4(model: PreTrainedModel, directory: str | Path) -> None:
    """Write `model`, its NF4Linears packed as they are, so that transformers and bitsandbytes load it.

    Raises:
        ValueError: `directory` exists, no linear of the model is packed, one has an adapter, or they are packed in a
            data type that bitsandbytes lacks or in several; nothing is written.
    """
    directory = Path(directory)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    if not packed:
        raise ValueError("no linear of the model is packed: quantize it first")
    quant_type, *others = sorted({linear.quant_type for linear in packed.values()})
    if others or quant_type not in BITSANDBYTES_TYPES:
        found = ", ".join([quant_type, *others])
        raise ValueError(f"packed in {found}, of which bitsandbytes takes one of {', '.join(BITSANDBYTES_TYPES)}")
    state = state_of(model)
    if wrapped_linears(model) or (state is not None and state.active is not None):
        raise ValueError("the model has adapters, which a bitsandbytes directory cannot hold: detach or merge them")
    if directory.exists():
        raise ValueError(f"{directory} exists already: nothing is overwritten")
    tensors = model.state_dict()
    for name, linear in packed.items():
        for key in linear.state_dict().keys() - {"bias"}:
            del tensors[f"{name}.{key}"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in _packed_state(linear).items()}
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": any(linear.quant_state.nested for linear in packed.values()),
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,  # transformers takes every other linear for a packed one
    }
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial, state_dict=tensors)
        os.rename(partial, directory)
    finally:
        del model.config.quantization_config
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------ reading


def by_definition(model: nn.Module) -> nn.Module:
    """Have the bitsandbytes linears in `model` compute with their dequantized weights; returns the model.

    On processors with AVX-512 and bf16 they repack themselves in evaluation mode otherwise, for a kernel that rounds
    absmax to bf16 and takes only some shapes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _quant_type(directory: Path) -> str:
    """The data type that config.json says the weights are packed in; ValueError unless it is one of bitsandbytes'."""
    found = quantization_of(directory)
    if found is None:
        raise ValueError(f"{directory}: config.json has no quantization_config: the weights are not packed")
    if found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit"):
        kind = found.get("quant_method", "an unknown method") if not found.get("load_in_8bit") else "8-bit bitsandbytes"
        raise ValueError(f"{directory}: the weights are packed with {kind}; only bitsandbytes' NF4 and FP4 can be read")
    quant_type = found.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in BITSANDBYTES_TYPES:
        raise ValueError(f"{directory}: bnb_4bit_quant_type is {quant_type}, not {' or '.join(BITSANDBYTES_TYPES)}")
    return quant_type


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters on the meta device but real buffers, some of which no file holds."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _is_packed(files: TensorFiles, weight: str) -> bool:
    """True if there is anything of a packed weight, so that all of it must be there."""
    if any(name.startswith(f"{weight}.") for name in files):
        return True
    return weight in files and not files.tensor(weight).is_floating_point()


def _load_dense(model: nn.Module, files: TensorFiles, packed: set[str]) -> None:
    """Fill every parameter and persistent buffer of `model` but `packed`, in the dtype it has."""
    names_of: dict[int, list[str]] = {}  # tied parameters are one tensor with several names
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names_of.setdefault(id(tensor), []).append(name)
    for names in names_of.values():
        if not packed.isdisjoint(names):
            if len(names) > 1:
                raise ValueError(f"{files.directory}: {names[-1]} is packed, but config.json ties it to {names[0]}")
            continue
        old = state[names[0]]
        first, *others = [name for name in names if name in files] or names[:1]
        value = files.read(first, None if old.is_floating_point() else old.dtype, old.shape)
        if value.is_floating_point() != old.is_floating_point():
            raise ValueError(f"{files.path(first)}: {first} is {describe(value.dtype, value.shape)}, not floats")
        for name in others:
            if not torch.equal(files.read(name), value):
                raise ValueError(f"{files.path(name)}: {name} is not {first}, to which config.json ties it")
        value = value.to(old.dtype)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, old.requires_grad)
        for name in names:
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            (module._parameters if isinstance(old, nn.Parameter) else module._buffers)[leaf] = value


def _read_packed(files: TensorFiles, weight: str, shape: torch.Size, quant_type: str) -> tuple[Tensor, QuantState]:
    """Codes uint8 [ceil(n / 2)] and quant_state of the packed weight called `weight`, checked against each other."""
    for other in BITSANDBYTES_TYPES:
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
        _check_map(files, f"{weight}.nested_quant_map", dynamic_map())
        nested_absmax = files.read(f"{weight}.nested_absmax", torch.float32, (nested_blocks(blocks),))
        nested_offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
    dtype = getattr(torch, state["dtype"])
    quant_state = QuantState(absmax, shape, dtype, state["blocksize"], nested_absmax, nested_offset, quant_type)
    return codes.view(-1).view(torch.uint8), quant_state


def _check_map(files: TensorFiles, name: str, expected: Tensor) -> None:
    found = files.read(name, torch.float32, expected.shape)
    # torch computes the 8-bit map on each machine anew, and its last bits may differ there.
    if not torch.allclose(found, expected, rtol=1e-6, atol=0):
        raise ValueError(f"{files.path(name)}: {name} does not hold the values that bitsandbytes has")


def _read_quant_state(files: TensorFiles, weight: str, shape: torch.Size, quant_type: str) -> dict:
    """What the JSON of a packed weight says, checked."""
    name = f"{weight}.{QUANT_STATE}{quant_type}"
    raw = files.read(name, torch.uint8)
    try:
        state = json.loads(raw.numpy().tobytes())
    except ValueError as error:
        raise ValueError(f"{files.path(name)}: {name} is not JSON: {error}") from error

    def check(key: str, allowed: bool, what: str) -> None:
        if not allowed:
            raise ValueError(f"{files.path(name)}: {name} has {key}={state.get(key)!r}; it must be {what}")

    floats = [str(dtype).removeprefix("torch.") for dtype in FLOATS]
    check("quant_type", state.get("quant_type") == quant_type, quant_type)
    check("blocksize", state.get("blocksize") in BLOCKSIZES, f"one of {', '.join(map(str, BLOCKSIZES))}")
    check("dtype", state.get("dtype") in floats, f"one of {', '.join(floats)}")
    check("shape", state.get("shape") == list(shape), f"{list(shape)}, the model's")
    if any(key.startswith("nested_") for key in state) or f"{weight}.nested_absmax" in files:
        check("nested_blocksize", state.get("nested_blocksize") == NESTED_BLOCKSIZE, str(NESTED_BLOCKSIZE))
        check("nested_dtype", state.get("nested_dtype") == "float32", "float32")
        offset = state.get("nested_offset")
        check("nested_offset", isinstance(offset, float | int) and math.isfinite(offset), "a finite number")
    return state


# ------------------------------------------------------------------------------------ writing


def _packed_state(linear: NF4Linear) -> dict[str, Tensor]:
    """The tensors of a packed weight under bitsandbytes' names. Those that are the same for every weight are copies."""
    quant_state = linear.quant_state
    state = {
        "quant_type": quant_state.quant_type,
        "blocksize": quant_state.blocksize,
        "dtype": str(quant_state.dtype).removeprefix("torch."),
        "shape": list(quant_state.shape),
    }
    tensors = {
        "weight": linear.weight.view(-1, 1),
        "weight.absmax": linear.absmax,
        "weight.quant_map": levels(quant_state.quant_type).clone(),
    }
    if quant_state.nested:
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": linear.nested_offset.item(),
        }
        tensors["weight.nested_absmax"] = linear.nested_absmax
        tensors["weight.nested_quant_map"] = dynamic_map().clone()
    as_json = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.{QUANT_STATE}{quant_state.quant_type}"] = as_json
    return tensors
