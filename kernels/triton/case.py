"""A configuration of a kernel that is compiled without a GPU, counted and held to a budget.

`CASES: list[Case]` at the end of a kernel file lists the configurations that its launchers may choose. A case calls the
launcher on meta tensors and names one of the launches that follow: `python -m kernels.aot` compiles that launch with
the types, constants, alignments, warps and stages that it would really have. So a case states only the call, how the
machine code is counted, and its budget.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels.codebook import default_blocksize
from kernels.triton.launch import Launch, recording
from kernels.weight import QuantState, Weight, nested_blocks, packed_sizes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by the names in configurations
Count = float | Callable[[SimpleNamespace], float]


@dataclass(frozen=True)
class Case:
    """One configuration of one kernel.

    A count is a number, or a function of the arguments of the launch: `lambda a: a.BLOCK_M * a.BLOCK_N`.

    Attributes:
        kernel: its name in reports.
        config: name of the configuration in reports, unique for the kernel.
        call: calls the launcher on meta tensors.
        fn: the `@triton.jit` function that `call` launches once; its other launches do not matter.
        values: count of the values (weights, elements) that a program handles, or one trip of its main loop.
        bytes_per_value: global memory traffic of this kernel.
        flops_per_value: count of the operations of the matrix units; a multiply-add is two.
        loop: `values` are those of one trip of the main loop.
        launches: kernels that the op launches.
        only_on: targets to compile for; all if empty.
        max_instr: most instructions a value on NVIDIA GPUs; `max_instr_on` for one target.
        max_registers: most registers a thread on NVIDIA GPUs.
        min_load_bits, min_store_bits: width that the widest load from and store to global memory must have.
        mma: the machine code must use the matrix units.
    """

    kernel: str
    config: str
    call: Callable[[], Any]
    fn: Any
    values: Count
    bytes_per_value: float
    flops_per_value: Count = 0.0
    loop: bool | Callable[[SimpleNamespace], bool] = False
    launches: int = 1
    only_on: tuple[str, ...] = ()
    max_instr: float | None = None
    max_instr_on: Mapping[str, float] = field(default_factory=dict)
    max_registers: int = 255
    min_load_bits: int = 0
    min_store_bits: int = 0
    mma: bool = False

    @cached_property
    def launch(self) -> Launch:
        """The launch that is compiled.

        Raises:
            ValueError: `call` does not launch `fn`, or does so more than once.
        """
        with recording() as launches:
            self.call()
        found = [launch for launch in launches if launch.kernel is self.fn]
        if len(found) != 1:
            raise ValueError(f"{self.kernel}/{self.config}: its call launches {self.fn.__name__} {len(found)} times")
        return found[0]

    def count(self, count: Count) -> float:
        return count(SimpleNamespace(**self.launch.arguments)) if callable(count) else count

    @property
    def uses_bf16(self) -> bool:
        tensors = (value for value in self.launch.arguments.values() if isinstance(value, Tensor))
        return any(tensor.dtype == torch.bfloat16 for tensor in tensors)


def meta(*shape: int, dtype: torch.dtype | str = torch.float32) -> Tensor:
    """A tensor without memory; `dtype` may be a name in `DTYPES`."""
    return torch.empty(shape, dtype=DTYPES.get(dtype, dtype), device="meta")


def meta_packed(
    *shape: int,
    blocksize: int | None = None,
    double_quant: bool = True,
    dtype: torch.dtype | str = torch.bfloat16,
    quant_type: str = "nf4",
) -> Weight:
    """A packed weight without memory."""
    blocksize = blocksize or default_blocksize(quant_type)
    n_bytes, blocks = packed_sizes(torch.Size(shape).numel(), blocksize)
    absmax = meta(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = (meta(nested_blocks(blocks)), meta()) if double_quant else ()
    state = QuantState(absmax, torch.Size(shape), DTYPES.get(dtype, dtype), blocksize, *nested, quant_type=quant_type)
    return Weight(meta(n_bytes, dtype=torch.uint8), state)
