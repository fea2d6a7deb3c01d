"""The GPUs that kernels are compiled for."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

_KIB = 1024


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory a block may have
    bf16: bool = True
    mma: bool = True  # Triton has matrix instructions for it

    @property
    def nvidia(self) -> bool:
        return self.gpu.backend == "cuda"


TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64 * _KIB, bf16=False, mma=False),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * _KIB),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * _KIB),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * _KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * _KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * _KIB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * _KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * _KIB),
}
