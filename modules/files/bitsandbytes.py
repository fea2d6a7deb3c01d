"""Load and save models in 4 bits in the format of transformers and bitsandbytes, without needing bitsandbytes.

The weights of packed linears are as packed_weight.py describes. All other tensors are as in a dense model's directory.
config.json has a `quantization_config`.

Packed experts, and data types that bitsandbytes lacks, are written in the same way, the experts of a layer as one
weight [experts, out, in]. Their `quant_method` is not bitsandbytes' but OURS, so that transformers refuses them.
"""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kernels import Weight
from kernels.codebook import BITSANDBYTES_TYPES, quant_types
from modules.adapters.state import state_of
from modules.adapters.targets import wrapped_linears
from modules.experts import NF4Experts
from modules.files.checked import seal_directory
from modules.files.conversion import are_joined
from modules.files.packed_model import load_packed, quantization_of
from modules.files.packed_weight import is_packed, packed_tensors, read_packed
from modules.files.tensors import TensorFiles
from modules.linear import NF4Linear, weight_of

OURS = "qdora"


def load_bnb4(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model that transformers and bitsandbytes, `save_bnb4` or `save_packed` saved in 4 bits.

    Arguments, result and errors are those of `load_packed`.
    """
    directory = Path(directory)
    quant_type = _quant_type(directory)

    def read(files: TensorFiles, name: str, shape: torch.Size, dtype: torch.dtype) -> Weight:
        return read_packed(files, f"{name}.weight", shape, quant_type)

    return load_packed(directory, dtype, lambda files, name: is_packed(files, f"{name}.weight"), read)


def save_bnb4(model: PreTrainedModel, directory: str | Path) -> None:
    """Write `model` so that transformers and bitsandbytes load it. Packed linears are written as they are.

    Raises:
        ValueError: as `save_packed`; or experts are packed, or linears in a data type that bitsandbytes lacks.
    """
    packed = _packed(model)
    if experts := [name for name, linear in packed.items() if isinstance(linear, NF4Experts)]:
        raise ValueError(f"{experts[0]} is packed, and bitsandbytes has no packed experts")
    if (quant_type := _one_type(packed)) not in BITSANDBYTES_TYPES:
        raise ValueError(f"packed in {quant_type}: bitsandbytes supports one of {', '.join(BITSANDBYTES_TYPES)}")
    save_packed(model, directory)


def save_packed(model: PreTrainedModel, directory: str | Path) -> None:
    """Write `model` so that `load_bnb4` loads it; transformers and bitsandbytes too, if they can have such weights.

    Raises:
        ValueError: `directory` exists, the model has an adapter, no linear is packed, or the linears are packed in
            several data types. Nothing is written then.
    """
    directory = Path(directory)
    packed = _packed(model)
    quant_type = _one_type(packed)
    state = state_of(model)
    if wrapped_linears(model) or (state is not None and state.active is not None):
        raise ValueError("a directory of a packed model cannot hold adapters: detach or merge them first")
    if directory.exists():
        raise ValueError(f"{directory} exists already: nothing is overwritten")
    tensors = model.state_dict()
    for name, linear in packed.items():
        for key in linear.state_dict().keys() - {"bias", "_bias"}:
            del tensors[f"{name}.{key}"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed_tensors(weight_of(linear)).items()}
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    ours = quant_type not in BITSANDBYTES_TYPES or any(isinstance(linear, NF4Experts) for linear in packed.values())
    if ours:
        settings = {"quant_method": OURS, "quant_type": quant_type}
    else:
        settings = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_use_double_quant": any(linear.quant_state.nested for linear in packed.values()),
            "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            # transformers treats every other linear as packed
            "llm_int8_skip_modules": [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)],
        }
    model.config.quantization_config = settings
    try:
        partial.mkdir(parents=True)
        joined = are_joined(model, [f"{name}.weight" for name in packed])
        model.save_pretrained(partial, state_dict=tensors, save_original_format=not joined)
        seal_directory(partial)
        os.rename(partial, directory)
    finally:
        del model.config.quantization_config
        shutil.rmtree(partial, ignore_errors=True)


def _packed(model: nn.Module) -> dict[str, NF4Linear]:
    """The packed linears of `model`. ValueError: there are none."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    if not packed:
        raise ValueError("no linear of the model is packed: quantize it first")
    return packed


def _one_type(packed: dict[str, NF4Linear]) -> str:
    """The data type of `packed` linears. ValueError: they have several."""
    quant_type, *others = sorted({linear.quant_type for linear in packed.values()})
    if others:
        raise ValueError(f"packed in {', '.join([quant_type, *others])}: all linears must have one data type")
    return quant_type


def by_definition(model: nn.Module) -> nn.Module:
    """Make the bitsandbytes linears in `model` compute with the weights that their codes stand for; returns the model.

    On a CPU bitsandbytes 0.50 computes with others: it dequantizes wrongly if rows are not a whole number of blocks,
    and in evaluation mode with AVX-512 and bf16 it repacks weights for a kernel that rounds absmax to bf16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.register_forward_hook(_by_definition)
    return model


def _by_definition(linear: nn.Module, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    """Forward hook of a bitsandbytes linear: the result by the definition of its format."""
    from bitsandbytes.functional import dequantize_blockwise  # only a model that it has loaded needs it

    state, codes = linear.weight.quant_state, linear.weight.data.view(torch.uint8).flatten()
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).float() + state.offset
    values = state.code.to(codes.device)[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    n = state.shape.numel()
    weight = (values[:n] * absmax.float().repeat_interleave(state.blocksize)[:n]).view(state.shape)
    x, bias = inputs[0], linear.bias
    weight = weight.to(state.dtype).to(x.dtype)
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _quant_type(directory: Path) -> str:
    """The 4-bit data type in config.json.

    Raises:
        ValueError: the weights are dense, or packed in another way than ours and bitsandbytes' NF4 and FP4.
    """
    found = quantization_of(directory)
    if found is None:
        raise ValueError(f"{directory}: config.json has no quantization_config: the weights are not packed")
    if found.get("quant_method") == OURS:
        if found.get("quant_type") not in quant_types():
            names = ", ".join(quant_types())
            raise ValueError(f"{directory}: quant_type is {found.get('quant_type')}, not one of {names}")
        return found["quant_type"]
    if found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit"):
        kind = found.get("quant_method", "an unknown method") if not found.get("load_in_8bit") else "8-bit bitsandbytes"
        raise ValueError(f"{directory}: the weights are packed with {kind}; only bitsandbytes' NF4 and FP4 can be read")
    quant_type = found.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in BITSANDBYTES_TYPES:
        raise ValueError(f"{directory}: bnb_4bit_quant_type is {quant_type}, not {' or '.join(BITSANDBYTES_TYPES)}")
    return quant_type
