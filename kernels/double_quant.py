"""Double quantization: the fp32 absmax of NF4 blocks in 8 bits.

    offset  = mean(absmax)
    nested_absmax_b = max |absmax_i - offset| over block b of 256
    c_i     = code of (absmax_i - offset) / nested_absmax_b in the signed dynamic map
    absmax' = map[c] · nested_absmax + offset                     two roundings: never one fused multiply-add

Costs 8/64 + 32/(64·256) = 0.127 bits a weight at block 64 instead of 32/64 = 0.5. QLoRA, Dettmers et al. 2023, §3;
byte for byte bitsandbytes' `compress_statistics=True` on an x86 CPU (see `codebook.dynamic_codes`).

Special values follow bitsandbytes. A block whose values are all the mean has nested_absmax 0 and codes 0. An
infinity or a NaN in absmax makes the offset inf or NaN, so that every absmax dequantizes to NaN: the tensor is lost,
and visibly so.

Memory layout: absmax [blocks], codes [blocks] and nested_absmax [ceil(blocks / 256)] are flat and contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.codebook import NESTED_BLOCKSIZE, dynamic_codes, dynamic_map
from kernels.dispatch import use_triton
from kernels.spec import KernelSpec

_NESTED = tl.constexpr(NESTED_BLOCKSIZE)
NUM_WARPS = 1  # a program handles one nested block: 8 values a thread, 1/64 or less of an NF4 tensor's work


@triton.jit
def load_absmax(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, live, BLOCKS: tl.constexpr
):  # fp32 [BLOCKS]
    """absmax of blocks first … first + BLOCKS - 1, dequantized if nested_absmax_ptr is not None.

    Those from `live` on are not read and get any number. They must not cross a nested block: BLOCKS divides 256 and
    first is a multiple of BLOCKS.
    """
    block = tl.arange(0, BLOCKS)
    if nested_absmax_ptr is None:
        return tl.load(absmax_ptr + first + block, mask=block < live, other=0.0)
    else:
        code = tl.load(absmax_ptr + first + block, mask=block < live, other=0).to(tl.int32)
        nested_absmax = tl.load(nested_absmax_ptr + first // _NESTED, mask=live > 0, other=0.0)
        return tl.load(map_ptr + code) * nested_absmax + tl.load(nested_offset_ptr)


@triton.jit
def _quantize_absmax_kernel(
    absmax_ptr,  # fp32 [n]
    offset_ptr,  # fp32 []
    code_of_point_ptr,  # u8 [65536]
    codes_ptr,  # u8 [n]
    nested_absmax_ptr,  # fp32 [ceil(n / 256)]
    n: tl.int64,
):
    block = tl.program_id(0).to(tl.int64)
    i = block * _NESTED + tl.arange(0, _NESTED)
    x = tl.load(absmax_ptr + i, mask=i < n, other=0.0) - tl.load(offset_ptr)
    x = tl.where(i < n, x, 0.0)
    nested_absmax = tl.max(tl.where(x == x, tl.abs(x), 0.0), axis=0)  # a NaN does not count
    scaled = x * tl.math.div_rn(1.0, nested_absmax)
    point = (tl.minimum(tl.maximum(scaled, -1.0), 1.0) + 1.0) * 32767.5 + 0.5
    point = tl.where(scaled == scaled, point, 0.0).to(tl.int32)  # 0 · inf of a block of zeros is NaN: point 0
    tl.store(codes_ptr + i, tl.load(code_of_point_ptr + point), mask=i < n)
    tl.store(nested_absmax_ptr + block, nested_absmax)


@triton.jit
def _dequantize_absmax_kernel(
    codes_ptr,  # u8 [n]
    nested_absmax_ptr,  # fp32 [ceil(n / 256)]
    nested_offset_ptr,  # fp32 []
    map_ptr,  # fp32 [256]
    absmax_ptr,  # fp32 [n]
    n: tl.int64,
):
    first = tl.program_id(0).to(tl.int64) * _NESTED
    i = tl.arange(0, _NESTED)
    absmax = load_absmax(codes_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, n - first, _NESTED)
    tl.store(absmax_ptr + first + i, absmax, mask=i < n - first)


def _launch_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, device = absmax.numel(), absmax.device
    programs = nested_blocks(n)
    offset = absmax.mean()  # torch's own sum: the same number as the twin's on that device
    codes = torch.empty(n, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(programs, dtype=torch.float32, device=device)
    if n:
        with torch.cuda.device_of(absmax):
            _quantize_absmax_kernel[(programs,)](
                absmax, offset, dynamic_codes(device), codes, nested_absmax, n,
                num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return codes, nested_absmax, offset


def _launch_dequantize(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    n, device = codes.numel(), codes.device
    absmax = torch.empty(n, dtype=torch.float32, device=device)
    if n:
        with torch.cuda.device_of(codes):
            _dequantize_absmax_kernel[(nested_blocks(n),)](
                codes, nested_absmax, nested_offset, dynamic_map(device), absmax, n,
                num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return absmax


def nested_blocks(blocks: int) -> int:
    """Nested blocks that hold the absmax of `blocks` blocks."""
    return -(-blocks // NESTED_BLOCKSIZE)


@torch.library.custom_op("qdora::quantize_absmax", mutates_args=())
def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_quantize(absmax) if use_triton(absmax) else reference.quantize_absmax(absmax)


@_quantize_absmax.register_fake
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested_absmax = absmax.new_empty(nested_blocks(absmax.numel()))
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), nested_absmax, absmax.new_empty(())


@torch.library.custom_op("qdora::dequantize_absmax", mutates_args=())
def _dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    dequantize = _launch_dequantize if use_triton(codes) else reference.dequantize_absmax
    return dequantize(codes, nested_absmax, nested_offset)


@_dequantize_absmax.register_fake
def _(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize block maxima to 8 bits.

    Args:
        absmax: fp32 [blocks].

    Returns:
        codes uint8 [blocks], nested_absmax fp32 [ceil(blocks / 256)], nested_offset fp32 [].

    Raises:
        ValueError: not fp32, or not one-dimensional.
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise ValueError(f"absmax must be float32 [blocks], not {absmax.dtype} {tuple(absmax.shape)}")
    return torch.ops.qdora.quantize_absmax(absmax.contiguous())


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """The fp32 [blocks] that `quantize_absmax` returned codes, nested_absmax and nested_offset for.

    Raises:
        ValueError: wrong dtype, number of dimensions or number of values, or not contiguous.
    """
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.uint8, (codes.numel(),)),
        ("nested_absmax", nested_absmax, torch.float32, (nested_blocks(codes.numel()),)),
        ("nested_offset", nested_offset, torch.float32, ()),
    ):
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(shape)} for {codes.numel()} codes, "
                f"not {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    return torch.ops.qdora.dequantize_absmax(codes, nested_absmax, nested_offset)


_BYTES_PER_VALUE = 4 + 1 + 4 / NESTED_BLOCKSIZE
AOT_SPECS = [
    KernelSpec(
        kernel="absmax_quantize",
        config="b256",
        fn=_quantize_absmax_kernel,
        signature={
            "absmax_ptr": "*fp32",
            "offset_ptr": "*fp32",
            "code_of_point_ptr": "*u8",
            "codes_ptr": "*u8",
            "nested_absmax_ptr": "*fp32",
            "n": "i64",
        },
        constexprs={},
        values=NESTED_BLOCKSIZE,
        bytes_per_value=_BYTES_PER_VALUE,
        num_warps=NUM_WARPS,
        max_registers=64,
    ),
    KernelSpec(
        kernel="absmax_dequantize",
        config="b256",
        fn=_dequantize_absmax_kernel,
        signature={
            "codes_ptr": "*u8",
            "nested_absmax_ptr": "*fp32",
            "nested_offset_ptr": "*fp32",
            "map_ptr": "*fp32",
            "absmax_ptr": "*fp32",
            "n": "i64",
        },
        constexprs={},
        values=NESTED_BLOCKSIZE,
        bytes_per_value=_BYTES_PER_VALUE,
        num_warps=NUM_WARPS,
        max_registers=64,
    ),
]
