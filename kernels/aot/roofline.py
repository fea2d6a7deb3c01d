"""The limits of GPUs, and the least time that they leave a kernel.

Constants, all public: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and HGX B200 (multiprocessors, boost clock,
memory bandwidth, dense bf16 rate of the matrix units). A multiprocessor has four schedulers that each issue one
instruction of 32 threads a cycle, so 128 a cycle; of 32-bit integer and logic instructions, which unpacking 4-bit
codes mostly takes, it finishes 64 a cycle (CUDA C++ Programming Guide, throughput of arithmetic instructions).

Two break-evens follow from them, in instructions a value. Below the lower one, memory is the bound, whatever the
instructions are. Above the upper one, their issue is. Between the two it depends on the instructions.
"""

from dataclasses import dataclass

ISSUE = 128  # instructions of one thread a multiprocessor issues in a cycle
INTEGER = 64  # of them at most integer or logic ones


@dataclass(frozen=True)
class GPU:
    name: str
    multiprocessors: int
    clock: float  # Hz
    bytes_per_s: float
    flops_per_s: float

    def break_even(self, bytes_per_value: float) -> tuple[float, float]:
        """(lower, upper) number of instructions a value whose issue takes as long as the memory traffic of a value."""
        cycles = self.multiprocessors * self.clock * bytes_per_value / self.bytes_per_s
        return INTEGER * cycles, ISSUE * cycles

    def bound(self, instr_per_value: float, bytes_per_value: float, flops_per_value: float) -> tuple[float, str]:
        """(least seconds a value, their cause: "memory", "mma", "issue", or "mix": memory or issue)."""
        lower, upper = self.break_even(bytes_per_value)
        memory = bytes_per_value / self.bytes_per_s
        issue = instr_per_value / (ISSUE * self.multiprocessors * self.clock)
        matrix = flops_per_value / self.flops_per_s
        if matrix > max(memory, issue):
            return matrix, "mma"
        if instr_per_value > upper:
            return issue, "issue"
        return memory, "memory" if instr_per_value <= lower else "mix"


GPUS = {  # by the target compiled for
    "sm_80": GPU("A100", 108, 1.41e9, 2.039e12, 312e12),
    "sm_90": GPU("H100", 132, 1.98e9, 3.35e12, 989e12),
    "sm_100": GPU("B200", 148, 1.98e9, 8.0e12, 2250e12),
}
