"""Where a benchmark runs: the device, its speed limits, the software, the commit."""

import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass

import torch

from kernels.bench.spec import DTYPES
from kernels.bench.timing import times
from kernels.lora import _lora_linear

COPY_BYTES = 2**28  # past every cache
MATMUL_SIZE = {"cpu": 512, "cuda": 8192}
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "liger-kernel", "unsloth")


@dataclass(frozen=True)
class Machine:
    """The machine of a run, whose facts every row repeats.

    Attributes:
        name: of the device, and of the backend that our linears run on there.
        bytes_per_s, flops_per_s: the best speed of torch's copy, and of its matmul in each of DTYPES, in this run.
    """

    device: torch.device
    name: str
    versions: dict[str, str]
    commit: str
    bytes_per_s: float
    flops_per_s: dict[str, float]

    def emulates(self, dtype: str) -> bool:
        """True if products in `dtype` are far slower than in fp32, as bf16's are on a CPU that has none."""
        return self.flops_per_s[dtype] < self.flops_per_s["fp32"] / 2


def this_machine() -> Machine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device, _name(device), _versions(), commit() or "", _bytes_per_s(device), _flops_per_s(device))


def _name(device: torch.device) -> str:
    backend = _lora_linear.column(torch.empty(0, device=device))
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {backend} backend"
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return f"{cpu}, threads: {torch.get_num_threads()}, {backend} backend"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of the code, with "+changes" if files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _bytes_per_s(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = source.clone()
    (copies,) = times([lambda: target.copy_(source)], device, seconds=0.2)
    return 2 * COPY_BYTES / min(copies)


def _flops_per_s(device: torch.device) -> dict[str, float]:
    size = MATMUL_SIZE[device.type]
    speeds = {}
    for name, dtype in DTYPES.items():
        a = torch.ones(size, size, dtype=dtype, device=device)
        a @ a  # the first one sets up the library
        (products,) = times([lambda a=a: a @ a], device, seconds=0.2)
        speeds[name] = 2 * size**3 / min(products)
    return speeds
