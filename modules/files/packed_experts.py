"""The packed weight [experts, out, in] of a layer, read from a file that has a packed linear for each expert.

transformers joins such linears: of all experts along a new first dimension, then an expert's gate and up along rows. So
the bytes of the packed weight are those of gate of expert 0, up of expert 0, gate of expert 1, … one after another.

In NVFP4 every linear has a number of its own, which multiplies its scales. A packed weight has one for 256 blocks, 4096
values. So it can have all numbers where the linears are whole multiples of that, and where the numbers are equal.
"""

from collections.abc import Callable

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from kernels import QuantState, Weight
from kernels.codebook import NESTED_BLOCKSIZE
from kernels.weight import nested_blocks, packed_sizes
from modules.files.tensors import TensorFiles

Linears = list[list[str]]  # names in the file: of gate by expert, then of up; or of one of them, or of down, alone


def joins_experts(converter: WeightConverter) -> bool:
    """True if `converter` joins linears of experts as described above."""
    first, *more = converter.operations
    stacks = type(first) is MergeModulelist and first.dim == 0
    return stacks and (not more or (len(more) == 1 and type(more[0]) is Concatenate and more[0].dim == 1))


def read_experts(
    files: TensorFiles,
    linears: Linears,
    shape: torch.Size,
    dtype: torch.dtype,
    read: Callable[[TensorFiles, str, torch.Size, torch.dtype], Weight],
) -> Weight:
    """The packed weight of `linears`. No byte changes.

    Args:
        shape: [experts, out, in], the model's.
        read: the packed weight of one linear; see `load_packed`.

    Raises:
        ValueError: linears are missing or too many, or a number of their own cannot be kept.
    """
    experts, rows, columns = shape
    for of_one in linears:
        if len(of_one) != experts:
            raise ValueError(f"{files.directory}: {of_one[0]} and its like are {len(of_one)}, not {experts} experts'")
    names = [name for of_expert in zip(*linears) for name in of_expert]
    one = torch.Size((rows // len(linears), columns))
    codes = absmax = state = None
    numbers = []
    for i, name in enumerate(names):
        weight = read(files, name, one, dtype)
        if state is None:
            state = weight.quant_state
            n_bytes, blocks = packed_sizes(shape.numel(), state.blocksize)
            codes, absmax = torch.empty(n_bytes, dtype=torch.uint8), torch.empty(blocks, dtype=torch.uint8)
        codes.view(len(names), -1)[i] = weight.values
        absmax.view(len(names), -1)[i] = weight.quant_state.absmax
        numbers.append(weight.quant_state.nested_absmax[0])
        if numbers[i] != numbers[0] and one.numel() % (NESTED_BLOCKSIZE * state.blocksize):
            raise ValueError(
                f"{files.directory}: {name} and {names[0]} have scales of their own, which experts of "
                f"{one[0]} × {one[1]} values cannot have: {NESTED_BLOCKSIZE * state.blocksize} values share one"
            )
    of_all = nested_blocks(blocks)
    nested = torch.stack(numbers).repeat_interleave(-(-of_all // len(names)))[:of_all].clone()
    constants = (nested, state.nested_offset)
    return Weight(codes, QuantState(absmax, shape, dtype, state.blocksize, *constants, quant_type=state.quant_type))
