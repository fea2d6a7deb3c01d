"""MXFP4 and NVFP4 weights as others write them, to and from a Weight, byte for byte and never dense.

MXFP4 of gpt-oss: experts of one layer, stacked
    <name>_blocks         uint8 [experts, out, in / 32, 16]: codes
    <name>_scales         uint8 [experts, out, in / 32]
NVFP4 of ModelOpt
    <linear>.weight                  uint8 [out, in / 2]: codes
    <linear>.weight_scale            float8_e4m3fn [out, in / 16]
    <linear>.weight_scale_2          fp32 []: multiplies the scales
compressed-tensors, nvfp4-pack-quantized and mxfp4-pack-quantized
    <linear>.weight_packed           uint8 [out, in / 2]: codes
    <linear>.weight_scale            float8_e4m3fn [out, in / 16], or uint8 [out, in / 32]
    <linear>.weight_global_scale     fp32 [1], of NVFP4 alone: divides the scales

There the even element is in the low nibble of a byte, here in the high one: nibbles change places on the way.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels import QuantState, Weight
from kernels.codebook import BLOCK_FORMATS
from kernels.weight import nested_blocks
from modules.files.packed_model import load_packed, packed_linears, quantization_of, save_packed
from modules.files.tensors import TensorFiles, describe

BLOCKS, SCALES = "_blocks", "_scales"  # of the names of gpt-oss
# The tensors of a packed linear, by the names after the linear's: codes, scales, the tensor's number.
MODELOPT = ("weight", "weight_scale", "weight_scale_2")
COMPRESSED_TENSORS = ("weight_packed", "weight_scale", "weight_global_scale")
# By quant_method and algorithm in config.json. W4A16: activations are not quantized.
WRITTEN = {
    ("modelopt", "NVFP4"): ("nvfp4", MODELOPT),
    ("modelopt", "W4A16_NVFP4"): ("nvfp4", MODELOPT),
    ("compressed-tensors", "nvfp4-pack-quantized"): ("nvfp4", COMPRESSED_TENSORS),
    ("compressed-tensors", "mxfp4-pack-quantized"): ("mxfp4", COMPRESSED_TENSORS),
}
OF_ACTIVATIONS = r"\.(input_scale|input_global_scale|k_scale|v_scale)$"


def swapped(codes: Tensor) -> Tensor:
    """The same bytes with their nibbles in the other order, flat."""
    codes = codes.reshape(-1)
    return codes << 4 | codes >> 4


def weight_of_parts(
    codes: Tensor, scales: Tensor, quant_type: str, dtype: torch.dtype, tensor_scale: Tensor | float = 1.0
) -> Weight:
    """The weight of codes and scales as a file has them.

    Args:
        codes: uint8, the last dimension or the last two being the columns of the weight.
        scales: uint8 or the format's scale dtype, [..., in / blocksize].
        dtype: of the weight when it is dense.
        tensor_scale: what all scales are multiplied with.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    form = BLOCK_FORMATS[quant_type]
    shape = torch.Size((*scales.shape[:-1], scales.shape[-1] * form.blocksize)) if scales.dim() else scales.shape
    if scales.dtype not in (torch.uint8, form.scale_dtype) or scales.dim() < 2:
        raise ValueError(f"the scales of {quant_type} are {describe(scales.dtype, scales.shape)}, not bytes [out, …]")
    laid_out = codes.shape in ((*shape[:-1], shape[-1] // 2), (*scales.shape, form.blocksize // 2))
    if codes.dtype != torch.uint8 or not laid_out:
        raise ValueError(
            f"codes {describe(codes.dtype, codes.shape)} do not belong to scales "
            f"{describe(scales.dtype, scales.shape)} of {quant_type}, one for {form.blocksize} values"
        )
    absmax = scales.contiguous().view(torch.uint8).view(-1)
    nested = torch.as_tensor(tensor_scale, dtype=torch.float32, device=codes.device).reshape(())
    nested_absmax = nested.repeat(nested_blocks(absmax.numel()))
    state = QuantState(
        absmax, shape, dtype, form.blocksize, nested_absmax, torch.zeros_like(nested), quant_type=quant_type
    )
    return Weight(swapped(codes), state)


def parts_of_weight(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, the tensor's number) of a packed weight as files have them.

    They are uint8 [..., in / 2], the format's scale dtype [..., in / blocksize] and fp32 [].

    Raises:
        ValueError: blocks of the weight cross its rows, or parts of it have numbers of their own.
    """
    state = weight.quant_state
    form, columns = BLOCK_FORMATS[state.quant_type], state.shape[-1]
    if columns % form.blocksize:
        raise ValueError(f"{columns} columns are not a whole number of {state.quant_type}'s blocks of {form.blocksize}")
    nested = state.nested_absmax
    if nested.numel() and not torch.equal(nested, nested[:1].expand_as(nested)):
        raise ValueError(f"parts of the weight have numbers of their own, and a file of {state.quant_type} has one")
    scales = state.absmax.view(form.scale_dtype).view(*state.shape[:-1], columns // form.blocksize)
    return swapped(weight.values).view(*state.shape[:-1], columns // 2), scales, nested[0].clone()


# ------------------------------------------------------------------------------------------- gpt-oss


def mxfp4_names(files: TensorFiles) -> list[str]:
    """The weights that are stored as a pair of `_blocks` and `_scales`, without these endings.

    Raises:
        ValueError: one of a pair is missing.
    """
    halves = {name.removesuffix(end): name for end in (BLOCKS, SCALES) for name in files if name.endswith(end)}
    for name, half in halves.items():
        for end in (BLOCKS, SCALES):
            if name + end not in files:
                raise ValueError(f"{files.path(half)}: {name + end} is missing, and {half} is there")
    return sorted(halves)


def read_mxfp4(files: TensorFiles, name: str, dtype: torch.dtype) -> Weight:
    """The weight [experts, out, in] that is stored as `name`_blocks and `name`_scales.

    Its dense form is the transpose of transformers' [experts, in, out].

    Raises:
        ValueError: a tensor is missing, or they do not belong together.
    """
    blocks, scales = files.read(name + BLOCKS, torch.uint8), files.read(name + SCALES, torch.uint8)
    try:
        return weight_of_parts(blocks, scales, "mxfp4", dtype)
    except ValueError as error:
        raise ValueError(f"{files.path(name + BLOCKS)}: {name}: {error}") from error


def mxfp4_tensors(weight: Weight) -> dict[str, Tensor]:
    """The tensors that `read_mxfp4` reads, by the ends of their names."""
    codes, scales, _ = parts_of_weight(weight)
    return {BLOCKS: codes.view(*scales.shape, -1), SCALES: scales.view(torch.uint8)}


# ------------------------------------------------------------------------------------------- linears


def read_linear(
    files: TensorFiles, linear: str, shape: torch.Size, dtype: torch.dtype, quant_type: str, names: tuple[str, ...]
) -> Weight:
    """The packed weight [out, in] of a linear.

    Args:
        names: MODELOPT or COMPRESSED_TENSORS.

    Raises:
        ValueError: a tensor is missing, or does not fit the others or the model.
    """
    form, (rows, columns) = BLOCK_FORMATS[quant_type], shape
    codes_name, scale_name, number_name = (f"{linear}.{name}" for name in names)
    if columns % form.blocksize:
        raise ValueError(f"{files.directory}: {codes_name} has rows of {columns}, not whole blocks of {form.blocksize}")
    codes = files.read(codes_name, torch.uint8, (rows, columns // 2))
    stored = form.scale_dtype if form.per_tensor else torch.uint8
    scales = files.read(scale_name, stored, (rows, columns // form.blocksize))
    number = torch.ones(())
    if form.per_tensor:
        number = files.read(number_name, torch.float32)
        if number.numel() != 1 or not number.isfinite().all() or not (number > 0).all():
            raise ValueError(f"{files.path(number_name)}: {number_name} is not one number above 0")
        number = 1 / number if names == COMPRESSED_TENSORS else number
    return weight_of_parts(codes, scales, quant_type, dtype, number)


def linear_tensors(weight: Weight) -> dict[str, Tensor]:
    """The tensors of a packed weight [out, in], by the names after the linear's: NVFP4 as ModelOpt names them, MXFP4 as
    compressed-tensors does. So every bit comes back: a reciprocal would round the number of NVFP4's tensor."""
    codes, scales, number = parts_of_weight(weight)
    if BLOCK_FORMATS[weight.quant_state.quant_type].per_tensor:
        return dict(zip(MODELOPT, (codes, scales, number)))
    return dict(zip(COMPRESSED_TENSORS, (codes, scales.view(torch.uint8))))


# ------------------------------------------------------------------------------------------- models


def load_block_format(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model whose linears ModelOpt or compressed-tensors packed in NVFP4 or MXFP4.

    Activations stay in the compute dtype, also where the file has scales to quantize them with. Arguments, result and
    errors are those of `load_packed`.
    """
    directory = Path(directory)
    quant_type, names = _written_as(directory)

    def is_packed(files: TensorFiles, linear: str) -> bool:
        codes = f"{linear}.{names[0]}"
        return any(f"{linear}.{name}" in files for name in names[1:]) or (
            codes in files and not files.tensor(codes).is_floating_point()
        )

    def read(files: TensorFiles, linear: str, shape: torch.Size, dtype: torch.dtype) -> Weight:
        return read_linear(files, linear, shape, dtype, quant_type, names)

    return load_packed(directory, dtype, is_packed, read, (OF_ACTIVATIONS,))


def save_block_format(model: PreTrainedModel, directory: str | Path) -> None:
    """Write `model`, packed in NVFP4 or MXFP4, so that every bit comes back: NVFP4 as ModelOpt does, MXFP4 as
    compressed-tensors.

    Raises:
        ValueError: as `save_packed`, or the linears are packed otherwise. Nothing is written then.
    """
    quant_type, *others = sorted({linear.quant_type for linear in packed_linears(model).values()})
    if others or quant_type not in BLOCK_FORMATS:
        raise ValueError(f"packed in {', '.join([quant_type, *others])}: choose one of {', '.join(BLOCK_FORMATS)}")
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = {"num_bits": 4, "type": "float", "group_size": BLOCK_FORMATS[quant_type].blocksize, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if BLOCK_FORMATS[quant_type].per_tensor:
        written_by = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    else:
        weights |= {"strategy": "group", "symmetric": True, "scale_dtype": "torch.uint8"}
        written_by = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
        written_by |= {"quantization_status": "compressed"}
    save_packed(model, Path(directory), written_by | {"config_groups": groups, "ignore": dense}, linear_tensors)


def _written_as(directory: Path) -> tuple[str, tuple[str, ...]]:
    """(quant_type, names of a linear's tensors) that the configuration says. ValueError: neither is known."""
    found = quantization_of(directory) or {}
    method = found.get("quant_method")
    algorithm = found.get("quant_algo" if method == "modelopt" else "format")
    if (method, algorithm) not in WRITTEN:
        known = ", ".join(f"{writer}'s {name}" for writer, name in WRITTEN)
        raise ValueError(
            f"{directory}: the weights are packed with {method} ({algorithm}); bitsandbytes' NF4 and FP4 can be read, "
            f"and {known}"
        )
    return WRITTEN[method, algorithm]
