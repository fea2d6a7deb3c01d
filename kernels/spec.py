"""What a kernel file states about its kernels so that they can be compiled, counted and held to a budget.

`AOT_SPECS: list[KernelSpec]` at the end of a kernel file lists the configurations its launchers may choose;
`python -m kernels.aot` compiles each of them for every GPU it can be compiled for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelSpec:
    """One configuration of one kernel, and what its machine code may cost.

    Attributes:
        kernel: name in reports.
        config: name of the configuration in reports, unique for the kernel.
        fn: the `@triton.jit` function.
        signature: type of each run-time argument, e.g. {"x_ptr": "*bf16", "n": "i64"}.
        constexprs: value of each other argument; None for a pointer that is not there.
        values: values (weights, elements) a program handles, or handles in one loop iteration.
        bytes_per_value: global memory traffic of this kernel.
        flops_per_value: operations of the matrix units (a multiply-add is two).
        num_warps, num_stages, fp_fusion: as the launcher passes them.
        divisible: integer arguments that are multiples of 16 when this configuration is chosen. Pointers always are.
        loop: `values` are those of one iteration of the kernel's main loop.
        launches: kernels launched by the op that this kernel belongs to.
        only_on: targets to compile for, all if empty.
        max_instr: instructions a value, on NVIDIA GPUs; `max_instr_on` for one target.
        max_registers: registers a thread, on NVIDIA GPUs.
        min_load_bits, min_store_bits: width of the widest global load and store.
        mma: the machine code must use the matrix units.
    """

    kernel: str
    config: str
    fn: Callable
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    values: int
    bytes_per_value: float
    flops_per_value: float = 0.0
    num_warps: int = 4
    num_stages: int = 1
    fp_fusion: bool = False
    divisible: tuple[str, ...] = ()
    loop: bool = False
    launches: int = 1
    only_on: tuple[str, ...] = ()
    max_instr: float | None = None
    max_instr_on: Mapping[str, float] = field(default_factory=dict)
    max_registers: int = 255
    min_load_bits: int = 0
    min_store_bits: int = 0
    mma: bool = False

    @property
    def uses_bf16(self) -> bool:
        return any("bf16" in kind for kind in self.signature.values())
