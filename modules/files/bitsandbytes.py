"""Load and save models in 4 bits in the format of transformers and bitsandbytes, without needing bitsandbytes.

The weights of packed linears are as packed_weight.py describes. All other tensors are as in a dense model's directory.
config.json has a `quantization_config`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kernels import Weight
from kernels.codebook import BITSANDBYTES_TYPES
from modules.files.packed_model import load_packed, packed_linears, quantization_of, save_packed
from modules.files.packed_weight import is_packed, packed_tensors, read_packed
from modules.files.tensors import TensorFiles


def load_bnb4(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model that transformers and bitsandbytes, or `save_bnb4`, saved in NF4 or FP4.

    Arguments, result and errors are those of `load_packed`.
    """
    directory = Path(directory)
    quant_type = _quant_type(directory)

    def read(files: TensorFiles, linear: str, shape: torch.Size, dtype: torch.dtype) -> Weight:
        return read_packed(files, f"{linear}.weight", shape, quant_type)

    return load_packed(directory, dtype, lambda files, linear: is_packed(files, f"{linear}.weight"), read)


def save_bnb4(model: PreTrainedModel, directory: str | Path) -> None:
    """Write `model` so that transformers and bitsandbytes load it. Packed linears are written as they are.

    Raises:
        ValueError: `directory` exists, the model has an adapter, no linear is packed, or the linears are packed in
            several data types or in one that bitsandbytes lacks. Nothing is written then.
    """
    packed = packed_linears(model)
    quant_type, *others = sorted({linear.quant_type for linear in packed.values()})
    if others or quant_type not in BITSANDBYTES_TYPES:
        found = ", ".join([quant_type, *others])
        raise ValueError(f"packed in {found}: bitsandbytes supports one of {', '.join(BITSANDBYTES_TYPES)}")
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": any(linear.quant_state.nested for linear in packed.values()),
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,  # transformers treats every other linear as packed
    }
    save_packed(model, Path(directory), quantization, packed_tensors)


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
        ValueError: the weights are dense, or packed in another way than bitsandbytes' NF4 and FP4.
    """
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
