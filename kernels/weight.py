"""One frozen weight, dense or packed in four bits: a single thing that ops, modules and files take.

    Weight(w)                       w [out, in] in the dtype to compute in
    Weight(codes, quant_state)      uint8 codes with their QuantState, as `quantize_4bit` returns them

A `torch.library` op takes tensors, numbers and strings. Its opaque objects hide the tensors they hold from fake
tensors, from the meta device and from graph capture. So op.py hands a Weight to the dispatcher as a list of tensors and
one string (`flatten`), and the op gets it back as a Weight (`unflatten`). `Weight.dense` uses `flatten` too.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.codebook import BLOCK_FORMATS, BLOCKSIZES, NESTED_BLOCKSIZE, quant_types

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # dtypes that can be quantized and dequantized to
_DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}
_DENSE, _DOUBLE = "dense", " double"
# Of the experts that a GPU has dense at a time: one of Mixtral-8x7B's (28672 × 4096 in 16 bits), 32 of Qwen3-30B-A3B's.
# With 4096 tokens the product of such a part takes a third of a millisecond on an H100, so its launches, two more, do
# not count. That is from paper, not measured.
PART_BYTES = 2**28


@dataclass(frozen=True)
class QuantState:
    """The part of a packed tensor that is not its codes.

    Attributes:
        absmax: fp32 [blocks], or uint8 [blocks] codes when double-quantized: of the dynamic map, or of a block
            format the bytes of its scales (absmax.py).
        shape: shape of the tensor.
        dtype: dtype it had, and the default to dequantize to.
        blocksize: values a block, one of 32, 64, …, 4096, or the one that a block format has.
        nested_absmax: fp32 [ceil(blocks / 256)], or None without double quantization.
        nested_offset: fp32 [], the mean that was subtracted from absmax, or None. A block format's is 0.
        quant_type: the 4-bit data type, one of `kernels.codebook.quant_types()`.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    quant_type: str = "nf4"

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(absmax, nested_absmax, nested_offset)"""
        return self.absmax, self.nested_absmax, self.nested_offset


@dataclass(frozen=True)
class Weight:
    """A frozen weight.

    Attributes:
        values: the dense weight, or uint8 codes, two to a byte.
        quant_state: what belongs to the codes; None if the weight is dense.

    Raises:
        ValueError: codes and a quant_state that do not belong together.
    """

    values: Tensor
    quant_state: QuantState | None = None

    def __post_init__(self):
        if self.quant_state is not None:
            check_packed(self.values, self.quant_state)

    @property
    def packed(self) -> bool:
        return self.quant_state is not None

    @property
    def shape(self) -> torch.Size:
        return self.values.shape if self.quant_state is None else self.quant_state.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weight has when it is dense."""
        return self.values.dtype if self.quant_state is None else self.quant_state.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight in `dtype`, by default its own: `values` itself if it is that."""
        dtype = dtype or self.dtype
        if self.quant_state is None:
            return self.values.to(dtype)
        # by its name, because the op is defined over weights (nf4.py)
        return torch.ops.qdora.dequantize_4bit(*flatten(self), dtype)

    def rows(self) -> "Weight":
        """The same weight [E, out, in] as [E · out, in]: a view, but of a dense one whose memory lies otherwise."""
        if self.quant_state is None:
            return Weight(self.values.flatten(0, -2))
        shape = torch.Size((self.shape[:-1].numel(), self.shape[-1]))
        return checked_before(self.values, dataclasses.replace(self.quant_state, shape=shape))


def as_weight(weight: Tensor | Weight, quant_state: QuantState | None = None) -> Weight:
    """The Weight that public functions take in place of a tensor and its quant_state."""
    return weight if isinstance(weight, Weight) else Weight(weight, quant_state)


def flatten(weight: Weight) -> tuple[list[Tensor], str]:
    """The tensors of `weight`, and a string that says what they are."""
    state = weight.quant_state
    if state is None:
        return [weight.values], _DENSE
    shape = "x".join([str(size) for size in state.shape])
    text = f"{state.quant_type} {state.blocksize} {_DTYPE_NAMES[state.dtype]} {shape}"
    if state.nested_absmax is None:
        return [weight.values, state.absmax], text
    return [weight.values, state.absmax, state.nested_absmax, state.nested_offset], text + _DOUBLE


def unflatten(tensors: list[Tensor], text: str) -> Weight:
    """The weight that `flatten` was given."""
    if text == _DENSE:
        return Weight(tensors[0])
    quant_type, blocksize, dtype, shape = _parsed(text)
    codes, absmax, *nested = tensors
    return checked_before(codes, QuantState(absmax, shape, dtype, blocksize, *nested, quant_type=quant_type))


def checked_before(codes: Tensor, quant_state: QuantState) -> Weight:
    """Weight(codes, quant_state) without its checks, which take as long as a small linear's product on a CPU."""
    weight = object.__new__(Weight)
    object.__setattr__(weight, "values", codes)
    object.__setattr__(weight, "quant_state", quant_state)
    return weight


def packed_shape(text: str) -> torch.Size:
    """The shape of the packed weight for which `flatten` gave `text`. For a dense weight, read the tensor's shape
    instead."""
    return _parsed(text)[3]


def tensor_count(text: str) -> int:
    """How many tensors `flatten` gave with `text`."""
    return 1 if text == _DENSE else 4 if text.endswith(_DOUBLE) else 2


@functools.cache
def _parsed(text: str) -> tuple[str, int, torch.dtype, torch.Size]:
    quant_type, blocksize, dtype, shape = text.removesuffix(_DOUBLE).split(" ")
    return quant_type, int(blocksize), getattr(torch, dtype), torch.Size(map(int, shape.split("x")) if shape else ())


def holding(weight: Weight, start: int, end: int) -> tuple[Weight, int]:
    """(a packed part that holds the values start … end - 1 of a flattened packed weight, where `start` is in it).

    The part is a view of [n] values. It begins with a whole block, of double quantization with a whole nested one.
    """
    state = weight.quant_state
    blocksize, unit = state.blocksize, NESTED_BLOCKSIZE if state.nested else 1
    first_block = start // blocksize // unit * unit
    first, n = first_block * blocksize, min(-(-end // blocksize) * blocksize, weight.shape.numel())
    blocks = -(-n // blocksize)
    changed = {"absmax": state.absmax[first_block:blocks], "shape": torch.Size((n - first,))}
    if state.nested:
        changed["nested_absmax"] = state.nested_absmax[first_block // unit : nested_blocks(blocks)]
    # blocks have even sizes, so a part begins with a byte
    return checked_before(
        weight.values.view(-1)[first // 2 : -(-n // 2)], dataclasses.replace(state, **changed)
    ), start - first


def experts_of_part(shape: torch.Size, dtype: torch.dtype) -> int:
    """How many experts of a packed weight [E, out, in] a GPU has dense in `dtype` at a time: one at least, no more than
    fit PART_BYTES, and in each part as many, but for the last one."""
    experts = max(1, PART_BYTES // (shape[1:].numel() * dtype.itemsize))
    return -(-shape[0] // -(-shape[0] // experts))


def check_quant_type(quant_type: str) -> None:
    if quant_type not in quant_types():
        raise ValueError(f"quant_type {quant_type!r} is not one of {', '.join(quant_types())}")


def check_blocksize(blocksize: int, quant_type: str) -> None:
    if quant_type in BLOCK_FORMATS:
        fixed = BLOCK_FORMATS[quant_type].blocksize
        if blocksize != fixed:
            raise ValueError(f"blocksize {blocksize}: {quant_type} has blocks of {fixed}")
    elif blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")


def check_double_quant(double_quant: bool, quant_type: str) -> None:
    if quant_type in BLOCK_FORMATS and not double_quant:
        raise ValueError(f"double_quant=False: {quant_type} has scales of 8 bits")


def packed_sizes(n: int, blocksize: int) -> tuple[int, int]:
    """(bytes of codes, blocks) for n values."""
    return -(-n // 2), -(-n // blocksize)


def nested_blocks(blocks: int) -> int:
    """Nested blocks that hold the absmax of `blocks` blocks."""
    return -(-blocks // NESTED_BLOCKSIZE)


def check_packed(packed: Tensor, state: QuantState) -> None:
    """Raise ValueError if codes and a quant_state do not belong together."""
    check_quant_type(state.quant_type)
    check_blocksize(state.blocksize, state.quant_type)
    check_double_quant(state.nested, state.quant_type)
    n_bytes, blocks = packed_sizes(state.shape.numel(), state.blocksize)
    expected = [
        ("packed", packed, torch.uint8, n_bytes),
        ("absmax", state.absmax, torch.uint8 if state.nested else torch.float32, blocks),
    ]
    if state.nested:
        expected += [
            ("nested_absmax", state.nested_absmax, torch.float32, nested_blocks(blocks)),
            ("nested_offset", state.nested_offset, torch.float32, 1),
        ]
    elif state.nested_offset is not None:
        raise ValueError("nested_offset is given without nested_absmax")
    for name, tensor, dtype, numel in expected:
        if tensor is None or tensor.dtype != dtype or tensor.numel() != numel:
            found = "nothing" if tensor is None else f"{tensor.numel()} values of {tensor.dtype}"
            raise ValueError(
                f"{name}: {found}, but shape {tuple(state.shape)} at blocksize {state.blocksize} "
                f"needs {numel} of {dtype}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        if tensor.device != packed.device:
            raise ValueError(f"{name} is on {tensor.device} but packed on {packed.device}")


def check_input(x: Tensor, weight: Weight) -> None:
    """Check x [..., in] against a weight [out, in].

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    shape = weight.shape
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; it must be float32, float16 or bfloat16")
    if len(shape) != 2 or x.dim() == 0 or shape[1] != x.shape[-1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight of shape {tuple(shape)}")
    if not weight.packed and weight.values.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} but the weight is {weight.values.dtype}")


def check_adapter(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, out_features: int, bias: Tensor | None = None, dropout: float = 0.0
) -> None:
    """Check an adapter against x [..., in] and a weight [out, in].

    Raises:
        ValueError: shapes that do not fit, a rank of 0 or a dropout outside [0, 1).
    """
    rank = lora_A.shape[0]
    if rank == 0 or lora_A.shape != (rank, x.shape[-1]) or lora_B.shape != (out_features, rank):
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a weight "
            f"of shape {(out_features, x.shape[-1])}: they must be [rank, in] and [out, rank] with rank ≥ 1"
        )
    check_bias(bias, out_features)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")


def check_bias(bias: Tensor | None, out_features: int) -> None:
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias {tuple(bias.shape)} must be [{out_features}]")
