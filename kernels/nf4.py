"""NF4 quantize and dequantize.

    absmax_b = max |w_i| over block b                                        fp32
    code_i   = number of NF4 decision bounds below w_i / absmax_b            4 bits
    w'_i     = NF4_LEVELS[code_i] · absmax_b

Memory layout, byte for byte bitsandbytes': w is flattened row-major, blocks are `blocksize` consecutive values and
may cross rows, the last block may be partial; two codes a byte, the even element in the high nibble; fp32 absmax a
block. With double quantization the absmax itself is 8 bits (see double_quant.py), and is dequantized in the same
launch: no fp32 absmax is materialised. QLoRA, Dettmers et al. 2023, §3.

Special values follow bitsandbytes on a CPU. An all-zero block has absmax 0 and codes 7 (a partial one, absmax
1e-38). A block with an infinity has absmax inf: finite values get code 7, infinities (inf · 0 = NaN) code 15. A
block with a NaN has absmax NaN and codes 15. Such blocks dequantize to NaN or infinity, never to a wrong number;
which NaN is not defined.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.codebook import BLOCKSIZES, dynamic_map, nf4_bins, nf4_levels
from kernels.dispatch import use_triton
from kernels.double_quant import load_absmax, nested_blocks, quantize_absmax
from kernels.spec import KernelSpec

# A program handles 16384 values in steps. One step's values live in registers at once, the tables are loaded once a
# program: 4096 values a step keep dequantize at 32 registers (full occupancy), 2048 keep quantize at 56.
PROGRAM = 16384
DEQUANTIZE_STEP = 4096
QUANTIZE_STEP = 2048

_TINY_BITS = tl.constexpr(0x006CE3EE)  # of 1e-38 in fp32, the absmax that bitsandbytes divides zeros by
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantState:
    """What, beside the packed codes, is needed to get a tensor back.

    Attributes:
        absmax: fp32 [blocks], or uint8 [blocks] codes of the dynamic map when double-quantized.
        shape: shape of the tensor.
        dtype: dtype it had, and the default to dequantize to.
        blocksize: values a block, one of 32, 64, …, 4096.
        nested_absmax: fp32 [ceil(blocks / 256)], or None without double quantization.
        nested_offset: fp32 [], the mean that was subtracted from absmax, or None.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tensors in the order in which ops take them."""
        return self.absmax, self.nested_absmax, self.nested_offset


def check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")


def packed_sizes(n: int, blocksize: int) -> tuple[int, int]:
    """(bytes of codes, blocks) for n values."""
    return -(-n // 2), -(-n // blocksize)


@triton.jit
def _nibble_shifts():  # [8]
    """Bit position in a little-endian 32-bit word of the codes of its eight values."""
    value = tl.arange(0, 8)
    return value // 2 * 8 + 4 - value % 2 * 4


@triton.jit
def _dequantize_nf4_kernel(
    packed_ptr,  # u8 [ceil(n / 2)], 4-byte aligned
    absmax_ptr,  # fp32 [blocks], or u8 with double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_offset_ptr,  # fp32 [] or None
    map_ptr,  # fp32 [256] or None
    levels_ptr,  # fp32 [16]
    out_ptr,  # [n]
    n: tl.int64,
    BLOCKSIZE: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    EXACT: tl.constexpr,  # n is a multiple of STEP · STEPS: no masks, no tail
):
    BLOCKS: tl.constexpr = STEP // BLOCKSIZE
    pid = tl.program_id(0).to(tl.int64)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    shift = _nibble_shifts()
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
    word = tl.arange(0, STEP // 8)
    value = tl.arange(0, STEP)
    for step in tl.static_range(STEPS):
        tile = pid * STEPS + step
        # The masks count groups of 32 values: 16 bytes of codes, which keeps loads and stores 128 bits wide.
        if EXACT:
            groups = STEP // 32
        else:
            groups = tl.minimum(n // 32 - tile * (STEP // 32), STEP // 32).to(tl.int32)
        live = (groups * 32 + BLOCKSIZE - 1) // BLOCKSIZE
        absmax = load_absmax(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, tile * BLOCKS, live, BLOCKS
        )  # [BLOCKS]
        words = tl.load(words_ptr + tile * (STEP // 8) + word, mask=word // 4 < groups, other=0)  # [STEP / 8]
        codes = (words[:, None] >> shift[None, :]) & 15  # [STEP / 8, 8]
        level = tl.gather(levels, tl.reshape(codes, [STEP]), 0)
        w = tl.reshape(tl.reshape(level, [BLOCKS, BLOCKSIZE]) * absmax[:, None], [STEP])
        tl.store(out_ptr + tile * STEP + value, w.to(out_ptr.dtype.element_ty), mask=value // 32 < groups)
    if not EXACT and pid == tl.num_programs(0) - 1:
        _dequantize_tail(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels, out_ptr, n, BLOCKSIZE
        )


@triton.jit
def _dequantize_tail(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, levels, out_ptr, n, BLOCKSIZE: tl.constexpr
):
    """The last n % 32 values: they share one block and their bytes need not fill a word."""
    i = n // 32 * 32 + tl.arange(0, 32)
    byte = tl.load(packed_ptr + i // 2, mask=i < n, other=0).to(tl.int32)
    code = (byte >> (4 - i % 2 * 4).to(tl.int32)) & 15
    absmax = load_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, (n - 1) // BLOCKSIZE, 1, 1)  # [1]
    tl.store(out_ptr + i, (tl.gather(levels, code, 0) * absmax).to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _nf4_code(x, bin_code, bin_bound):
    """Codes of scaled values x (int32); NaN gets 15, as any x > 1."""
    x = tl.where(x <= 1.0, x, 1.0)
    # Adding 1.5 · 2^23 rounds 16 · x to an integer and leaves it in the low bits. Exact, fused or not.
    bin = tl.fma(x, 16.0, 12582912.0 + 16.0).to(tl.int32, bitcast=True) & 63
    below = tl.gather(bin_bound, bin, 0) - x  # its sign bit is set where x > bound
    return tl.gather(bin_code, bin, 0) + (below.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _quantize_nf4_kernel(
    w_ptr,  # [n]
    bin_code_ptr,  # i32 [64]
    bin_bound_ptr,  # fp32 [64]
    packed_ptr,  # u8 [ceil(n / 2)], 4-byte aligned
    absmax_ptr,  # fp32 [blocks]
    n: tl.int64,
    BLOCKSIZE: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    EXACT: tl.constexpr,  # n is a multiple of STEP · STEPS: no masks, no partial block
):
    BLOCKS: tl.constexpr = STEP // BLOCKSIZE
    pid = tl.program_id(0).to(tl.int64)
    bin_code = tl.load(bin_code_ptr + tl.arange(0, 64))
    bin_bound = tl.load(bin_bound_ptr + tl.arange(0, 64))
    shift = _nibble_shifts()
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
    word = tl.arange(0, STEP // 8)
    value = tl.arange(0, STEP)
    block = tl.arange(0, BLOCKS)
    for step in tl.static_range(STEPS):
        tile = pid * STEPS + step
        if EXACT:
            live = BLOCKS
        else:
            live = tl.minimum(n // BLOCKSIZE - tile * BLOCKS, BLOCKS).to(tl.int32)
        w = tl.load(w_ptr + tile * STEP + value, mask=value // BLOCKSIZE < live, other=0.0).to(tl.float32)
        w = tl.reshape(w, [BLOCKS, BLOCKSIZE])
        absmax = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # [BLOCKS]
        inverse = tl.math.div_rn(1.0, tl.maximum(absmax, _TINY_BITS).to(tl.float32, bitcast=True))
        code = _nf4_code(tl.reshape(w * inverse[:, None], [STEP]), bin_code, bin_bound)
        words = tl.sum(tl.reshape(code, [STEP // 8, 8]) << shift[None, :], axis=1)
        tl.store(words_ptr + tile * (STEP // 8) + word, words, mask=word // (BLOCKSIZE // 8) < live)
        tl.store(absmax_ptr + tile * BLOCKS + block, absmax.to(tl.float32, bitcast=True), mask=block < live)
    if not EXACT and (pid == tl.num_programs(0) - 1) & (n % BLOCKSIZE > 0):
        _quantize_partial_block(w_ptr, bin_code, bin_bound, packed_ptr, absmax_ptr, n, BLOCKSIZE)


@triton.jit
def _quantize_partial_block(w_ptr, bin_code, bin_bound, packed_ptr, absmax_ptr, n, BLOCKSIZE: tl.constexpr):
    """The last n % BLOCKSIZE values: divided by absmax, not multiplied, and absmax is at least 1e-38 (see the twin)."""
    block = n // BLOCKSIZE
    i = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    w = tl.load(w_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    absmax = tl.maximum(tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0), _TINY_BITS)
    absmax = absmax.to(tl.float32, bitcast=True)
    scaled = tl.where(i < n, tl.math.div_rn(w, absmax), 0.0)
    pair = tl.reshape(_nf4_code(scaled, bin_code, bin_bound), [BLOCKSIZE // 2, 2])
    byte = tl.sum(pair << (4 - tl.arange(0, 2) * 4)[None, :], axis=1)
    j = tl.arange(0, BLOCKSIZE // 2)
    first = block * (BLOCKSIZE // 2)
    tl.store(packed_ptr + first + j, byte.to(tl.uint8), mask=first + j < (n + 1) // 2)
    tl.store(absmax_ptr + block, absmax)


def _steps(n: int, step: int, blocksize: int) -> dict[str, int]:
    """Constexprs that cut n values into programs of PROGRAM values in steps of `step` or one block."""
    step = max(step, blocksize)
    return {"BLOCKSIZE": blocksize, "STEP": step, "STEPS": PROGRAM // step, "EXACT": n % PROGRAM == 0}


def _launch_quantize(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n, device = w.numel(), w.device
    n_bytes, blocks = packed_sizes(n, blocksize)
    packed = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    if n:
        with torch.cuda.device_of(w):
            _quantize_nf4_kernel[(triton.cdiv(n, PROGRAM),)](
                w, *nf4_bins(device), packed, absmax, n, **_steps(n, QUANTIZE_STEP, blocksize), enable_fp_fusion=False
            )
    return packed, absmax


def _launch_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    device = packed.device
    out = torch.empty(shape, dtype=dtype, device=device)
    n = out.numel()
    if packed.data_ptr() % 4:  # a slice of a bigger buffer: the kernel reads words
        packed = packed.clone()
    if n:
        with torch.cuda.device_of(packed):
            _dequantize_nf4_kernel[(triton.cdiv(n, PROGRAM),)](
                packed,
                absmax,
                nested_absmax,
                nested_offset,
                None if nested_absmax is None else dynamic_map(device),
                nf4_levels(device),
                out,
                n,
                **_steps(n, DEQUANTIZE_STEP, blocksize),
                enable_fp_fusion=False,
            )
    return out


@torch.library.custom_op("qdora::quantize_nf4", mutates_args=())
def _quantize_nf4(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return _launch_quantize(w, blocksize) if use_triton(w) else reference.quantize_nf4(w, blocksize)


@_quantize_nf4.register_fake
def _(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n_bytes, blocks = packed_sizes(w.numel(), blocksize)
    return w.new_empty(n_bytes, dtype=torch.uint8), w.new_empty(blocks, dtype=torch.float32)


@torch.library.custom_op("qdora::dequantize_nf4", mutates_args=())
def _dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return dequantize_impl(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype)


@_dequantize_nf4.register_fake
def _(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


def dequantize_impl(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The op's body, for ops that dequantize inside themselves."""
    dequantize = _launch_dequantize if use_triton(packed) else reference.dequantize_nf4
    return dequantize(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype)


def quantize_nf4(w: Tensor, blocksize: int = 64, double_quant: bool = False) -> tuple[Tensor, QuantState]:
    """Quantize `w` to NF4.

    Args:
        w: fp32, fp16 or bf16, any shape; made contiguous if it is not.
        blocksize: values that share an absmax: 32, 64, …, 4096.
        double_quant: store absmax in 8 bits (block 256, mean subtracted) instead of fp32.

    Returns:
        packed: uint8 [ceil(n / 2)], and its QuantState. Equal to `bitsandbytes.functional.quantize_4bit(w, …,
        quant_type="nf4", compress_statistics=double_quant)` on a CPU, whose packed is [ceil(n / 2), 1].

    Raises:
        ValueError: another dtype or block size.
    """
    check_blocksize(blocksize)
    if w.dtype not in FLOATS:
        raise ValueError(f"w is {w.dtype}; quantize_nf4 takes float32, float16 or bfloat16")
    packed, absmax = torch.ops.qdora.quantize_nf4(w.detach().contiguous(), blocksize)
    nested: tuple[Tensor | None, Tensor | None] = (None, None)
    if double_quant:
        absmax, *nested = quantize_absmax(absmax)
    return packed, QuantState(absmax, w.shape, w.dtype, blocksize, *nested)


def dequantize_nf4(packed: Tensor, quant_state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that `packed` stands for, in `dtype` (default: the dtype it had).

    Args:
        packed: uint8 with ceil(n / 2) values, contiguous, any shape.
        quant_state: as `quantize_nf4` returned it.
        dtype: fp32, fp16 or bf16. The product level · absmax is computed in fp32 and rounded once.

    Raises:
        ValueError: `packed` or a tensor of `quant_state` has the wrong dtype or number of values.
    """
    dtype = dtype or quant_state.dtype
    check_packed(packed, quant_state)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; dequantize_nf4 gives float32, float16 or bfloat16")
    return torch.ops.qdora.dequantize_nf4(
        packed, *quant_state.tensors(), quant_state.blocksize, quant_state.shape, dtype
    )


def check_packed(packed: Tensor, quant_state: QuantState) -> None:
    """Raise ValueError if `packed` and `quant_state` do not belong together."""
    check_blocksize(quant_state.blocksize)
    n_bytes, blocks = packed_sizes(quant_state.shape.numel(), quant_state.blocksize)
    expected = [
        ("packed", packed, torch.uint8, n_bytes),
        ("absmax", quant_state.absmax, torch.uint8 if quant_state.nested else torch.float32, blocks),
    ]
    if quant_state.nested:
        expected += [
            ("nested_absmax", quant_state.nested_absmax, torch.float32, nested_blocks(blocks)),
            ("nested_offset", quant_state.nested_offset, torch.float32, 1),
        ]
    for name, tensor, dtype, numel in expected:
        if tensor is None or tensor.dtype != dtype or tensor.numel() != numel:
            found = "nothing" if tensor is None else f"{tensor.numel()} values of {tensor.dtype}"
            raise ValueError(
                f"{name}: {found}, but shape {tuple(quant_state.shape)} at blocksize {quant_state.blocksize} "
                f"needs {numel} of {dtype}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
