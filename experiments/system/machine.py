"""The machine: device, compute dtype, allocator, threads, versions."""

import ctypes
import importlib.metadata
import mmap
import os
import platform
import random
import resource
import sys
from pathlib import Path

import numpy
import torch

from experiments.config import TrainerConfig
from experiments.errors import UserError
from experiments.system import memory, parallel
from kernels import cpu
from kernels.cpu.others import OthersLoad, crowded

MOST_THREADS = 16  # by default: the products of a small model's tokens are too small for more
SCARCE = 2**32  # bytes of free memory
FEW_PRIMITIVES = 32  # that oneDNN keeps where memory is scarce, not 1024: each has code for one shape of a product
HEAP_BLOCKS = 8  # of 512 MB: enough for a training step on a CPU
LOAD = OthersLoad()  # since this program began
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(trainer: TrainerConfig) -> torch.device:
    if trainer.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"trainer.device={trainer.device}: choose auto, cpu or cuda")
    if trainer.device == "cpu" or (trainer.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but torch sees no CUDA device: use trainer.device=auto")
    if parallel.size() == 1:
        return torch.device("cuda")
    if parallel.local_size() > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise UserError(f"{parallel.local_size()} processes and {gpus} GPUs here: start {gpus} with --nproc-per-node")
    torch.cuda.set_device(parallel.local_rank())
    return torch.device("cuda", parallel.local_rank())


def has_native_bf16(device: torch.device) -> bool:
    """True if bf16 matmuls run on the device's own instructions; emulated ones are ten times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_dtype(trainer: TrainerConfig, device: torch.device) -> torch.dtype:
    """The dtype matmuls run in: as asked, or bf16 where the device has it, else fp32."""
    check_dtype(trainer)
    if trainer.dtype == "auto":
        return torch.bfloat16 if has_native_bf16(device) else torch.float32
    return DTYPES[trainer.dtype]


def check_dtype(trainer: TrainerConfig) -> None:
    """Raise UserError unless `trainer.dtype` is auto or one of DTYPES."""
    if trainer.dtype not in ("auto", *DTYPES):
        raise UserError(f"trainer.dtype={trainer.dtype}: choose auto, {', '.join(DTYPES)}")


def set_up(trainer: TrainerConfig) -> tuple[torch.device, torch.dtype]:
    """Make the machine ready; return the device and the dtype to compute in."""
    device = pick_device(trainer)
    if device.type == "cpu":
        set_up_cpu(trainer)
    return device, pick_dtype(trainer, device)


def set_up_cpu(trainer: TrainerConfig) -> None:
    """Threads for products on the CPU, and an allocator for loading a model: see `keep_freed_memory`."""
    threads = min(torch.get_num_threads(), usable_cores())
    if parallel.size() > 1:  # torchrun tells every process to use one thread
        threads = max(1, usable_cores() // parallel.local_size())
    torch.set_num_threads(trainer.threads or min(threads, MOST_THREADS))
    cpu.threads.share_cores()
    _allocator(mapped_from=2**17)
    if _is_scarce():
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(FEW_PRIMITIVES))


def seed_all(seed: int) -> None:
    """Seed all random generators, as transformers.set_seed does, without its seconds of imports."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # of every device


def usable_cores() -> int:
    """Cores this process may use: those it is bound to or, in a container, its share of CPU time if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # not Linux, or no limit
        return cores


def keep_freed_memory() -> None:
    """Have the allocator reuse freed memory instead of returning it to the system, and keep it in huge pages. A
    training step allocates the same activations again and again, and would get each of their pages anew. While a model
    is loaded the opposite is better: a dense weight that has been packed should go back. So it is where memory is
    scarce: batches of many lengths leave gaps in a heap that is kept."""
    if _is_scarce():
        return
    _allocator(mapped_from=2**30, trimmed_from=-1)
    _huge_pages()


def _is_scarce() -> bool:
    free = memory.free_bytes(torch.device("cpu"))
    return free is not None and free < SCARCE


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libc.so.6")


def _allocator(mapped_from: int, trimmed_from: int = 2**17) -> None:
    """Tell glibc two limits. Blocks of `mapped_from` bytes or more come from the system and return to it. The free end
    of the heap returns if it exceeds `trimmed_from`; −1: never."""
    if libc := _glibc():
        libc.mallopt(-3, mapped_from)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trimmed_from)  # M_TRIM_THRESHOLD


def _huge_pages() -> None:
    """Ask for huge pages where the heap will grow, by taking addresses in advance: they cost no memory until used. A
    limit of the process counts them all the same, and then none would be left for anything but the heap."""
    limits = {resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)}
    if (libc := _glibc()) and limits == {resource.RLIM_INFINITY}:
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        blocks = [block for _ in range(HEAP_BLOCKS) if (block := libc.malloc(2**29))]
        for block in blocks:
            libc.madvise(-(-block // mmap.PAGESIZE) * mmap.PAGESIZE, 2**29 - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
        for block in blocks:
            libc.free(block)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """One line for the terminal: device and dtype of the run."""
    name, threads = device_name(device), torch.get_num_threads()
    if device.type == "cpu":
        name += f", {threads} thread{'s' if threads > 1 else ''}"
        cores = usable_cores() // parallel.local_size()
        name += f" for {cores} cores, trainer.threads={cores} for all" if threads == MOST_THREADS < cores else ""
    why = "" if has_native_bf16(device) else ", which has no bf16 matmul"
    if device.type == "cpu" and dtype == torch.bfloat16 and not cpu.threads.available():
        why += ", without kernels for CPUs: this PyTorch brings no libgomp"
    busy = ""
    if device.type == "cpu" and crowded(others := LOAD.cores(), threads):
        busy = f"; others keep {others:.1f} of {usable_cores()} cores busy, which slows it down"
        busy += ", and trainer.threads=1 may be faster" if threads > 1 else ""
    return f"{str(dtype).removeprefix('torch.')} on {device.type} ({name}{why}){busy}"


def device_name(device: torch.device) -> str:
    """The card, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


def about(device: torch.device) -> dict[str, str | int | float | bool]:
    """What a time measured here depends on: processor or card, threads, and other processes since `describe`."""
    others, threads = LOAD.cores(), torch.get_num_threads()
    needed = threads if device.type == "cpu" else 1
    name = {"device": device_name(device), "threads": threads}
    return name | {"others_cores": round(others, 2), "crowded": crowded(others, needed)}


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def versions() -> dict[str, str]:
    packages = ("torch", "triton", "transformers", "tokenizers", "safetensors", "hydra-core")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
