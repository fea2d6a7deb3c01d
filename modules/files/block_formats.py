"""MXFP4 and NVFP4 as others write them, read byte for byte and never dense.

gpt-oss, MXFP4: the experts of a layer
    <experts>.gate_up_proj_blocks    uint8 [experts, out, in / 32, 16]: codes; down_proj_blocks likewise
    <experts>.gate_up_proj_scales    uint8 [experts, out, in / 32]
ModelOpt, NVFP4
    <linear>.weight                  uint8 [out, in / 2]: codes
    <linear>.weight_scale            float8_e4m3fn [out, in / 16]
    <linear>.weight_scale_2          fp32 []: multiplies the scales
compressed-tensors, nvfp4-pack-quantized and mxfp4-pack-quantized
    <linear>.weight_packed           uint8 [out, in / 2]: codes
    <linear>.weight_scale            float8_e4m3fn [out, in / 16], or uint8 [out, in / 32]
    <linear>.weight_global_scale     fp32 [1], of NVFP4 alone: divides the scales

Of a mixture of experts the last two have such linears for each expert: packed_experts.py joins them.

There the even element is in the low nibble of a byte, here in the high one: nibbles change places on the way.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels import QuantState, Weight
from kernels.codebook import BLOCK_FORMATS
from kernels.weight import nested_blocks
from modules.files.packed_model import load_packed, quantization_of
from modules.files.tensors import TensorFiles

# How the names of a weight's tensors end: codes, scales, the tensor's number.
GPT_OSS = ("_blocks", "_scales")
MODELOPT = (".weight", ".weight_scale", ".weight_scale_2")
COMPRESSED_TENSORS = (".weight_packed", ".weight_scale", ".weight_global_scale")
# By quant_method and algorithm in config.json. W4A16: activations are not quantized.
WRITTEN = {
    ("mxfp4", None): ("mxfp4", GPT_OSS),
    ("modelopt", "NVFP4"): ("nvfp4", MODELOPT),
    ("modelopt", "W4A16_NVFP4"): ("nvfp4", MODELOPT),
    ("compressed-tensors", "nvfp4-pack-quantized"): ("nvfp4", COMPRESSED_TENSORS),
    ("compressed-tensors", "mxfp4-pack-quantized"): ("mxfp4", COMPRESSED_TENSORS),
}
OF_ACTIVATIONS = r"\.(input_scale|input_global_scale|k_scale|v_scale)$"


def load_block_format(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model whose linears, or experts, were packed in MXFP4 or NVFP4 by a writer in WRITTEN.

    Activations stay in the compute dtype, also where the file has scales to quantize them with. Arguments, result and
    errors are those of `load_packed`.
    """
    directory = Path(directory)
    quant_type, ends = _written_as(directory)

    def is_packed(files: TensorFiles, name: str) -> bool:
        codes = name + ends[0]
        scaled = any(name + end in files for end in ends[1:])
        return scaled or (codes in files and not files.tensor(codes).is_floating_point())

    def read(files: TensorFiles, name: str, shape: torch.Size, dtype: torch.dtype) -> Weight:
        return read_parts(files, name, shape, dtype, quant_type, ends)

    return load_packed(directory, dtype, is_packed, read, (OF_ACTIVATIONS,), ends)


def _written_as(directory: Path) -> tuple[str, tuple[str, ...]]:
    """(quant_type, ends of names) that the configuration says. ValueError: neither is known."""
    found = quantization_of(directory) or {}
    method = found.get("quant_method")
    algorithm = found.get("quant_algo" if method == "modelopt" else "format")
    if (method, algorithm) not in WRITTEN:
        kind = f"{method} ({algorithm})" if algorithm else str(method)
        raise ValueError(
            f"{directory}: the weights are packed with {kind}; bitsandbytes' NF4 and FP4, ModelOpt's NVFP4, "
            "compressed-tensors' NVFP4 and MXFP4 and gpt-oss' MXFP4 can be read"
        )
    return WRITTEN[method, algorithm]


def read_parts(
    files: TensorFiles, name: str, shape: torch.Size, dtype: torch.dtype, quant_type: str, ends: tuple[str, ...]
) -> Weight:
    """A packed weight.

    Args:
        name: of the linear, or of the linears of a layer's experts.
        shape: [out, in], or [experts, out, in].
        dtype: of the weight when it is dense.
        ends: GPT_OSS, MODELOPT or COMPRESSED_TENSORS.

    Raises:
        ValueError: a tensor is missing, or does not fit the model.
    """
    form, (*rows, columns) = BLOCK_FORMATS[quant_type], shape
    if columns % form.blocksize:
        blocks_of = f"blocks of {form.blocksize}"
        raise ValueError(f"{files.directory}: {name + ends[0]} has rows of {columns}, which are not whole {blocks_of}")
    blocks = (*rows, columns // form.blocksize)
    codes_shape = (*blocks, form.blocksize // 2) if ends == GPT_OSS else (*rows, columns // 2)
    codes = files.read(name + ends[0], torch.uint8, codes_shape)
    scales = files.read(name + ends[1], form.scale_dtype if form.per_tensor else torch.uint8, blocks)
    number = torch.ones(())
    if form.per_tensor:
        number = files.read(name + ends[2], torch.float32)
        if number.numel() != 1 or not 0 < number.item() < torch.inf:
            raise ValueError(f"{files.path(name + ends[2])}: {name + ends[2]} is not one number above 0")
        number = 1 / number if ends == COMPRESSED_TENSORS else number
    return weight_of_parts(codes, scales, number, quant_type, dtype)


def weight_of_parts(codes: Tensor, scales: Tensor, number: Tensor, quant_type: str, dtype: torch.dtype) -> Weight:
    """The weight [..., in] of tensors as files have them.

    Args:
        codes: uint8, two in a byte.
        scales: [..., in / blocksize], of a dtype with one byte.
        number: fp32 with one value, which multiplies the scales.

    Raises:
        ValueError: codes and scales that do not belong together.
    """
    blocksize = BLOCK_FORMATS[quant_type].blocksize
    shape = torch.Size((*scales.shape[:-1], scales.shape[-1] * blocksize))
    absmax = scales.contiguous().view(torch.uint8).view(-1)
    nested = number.reshape(1).repeat(nested_blocks(absmax.numel())), torch.zeros((), device=codes.device)
    return Weight(_swapped(codes), QuantState(absmax, shape, dtype, blocksize, *nested, quant_type=quant_type))


def parts_of_weight(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, number) for which `weight_of_parts` gives `weight`: uint8 [..., in / blocksize, blocksize / 2],
    the format's scale dtype [..., in / blocksize], fp32 [].

    Raises:
        ValueError: blocks of the weight cross its rows, or parts of it have numbers of their own.
    """
    state = weight.quant_state
    form, (*rows, columns) = BLOCK_FORMATS[state.quant_type], state.shape
    if columns % form.blocksize:
        raise ValueError(f"{columns} columns are not a whole number of {state.quant_type}'s blocks of {form.blocksize}")
    if (state.nested_absmax != state.nested_absmax[0]).any():
        raise ValueError(f"parts of the weight have numbers of their own, and a file of {state.quant_type} has one")
    scales = state.absmax.view(form.scale_dtype).view(*rows, columns // form.blocksize)
    return _swapped(weight.values).view(*scales.shape, form.blocksize // 2), scales, state.nested_absmax[0].clone()


def _swapped(codes: Tensor) -> Tensor:
    """The same bytes with their nibbles in the other order, flat."""
    codes = codes.reshape(-1)
    return codes << 4 | codes >> 4
