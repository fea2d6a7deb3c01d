"""Memory that is left, and errors that mean that none is."""

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = {  # version: what limits a group's memory, what it uses, and the part of this that goes when it is needed
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
LITTLE = 2**28  # bytes left, with which a library that cannot begin lacks memory
LIBRARIES = ("could not create a primitive", "could not create a memory", "std::bad_alloc", "can't start new thread")


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated there; None: the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        return min(_left_on_the_host(), default=None)
    except (OSError, ValueError, LookupError):  # not Linux
        return None


def out_of_memory(error: Exception) -> str | None:
    """Words for the user; None: it is another error. torch has a class of its own for a GPU's memory alone, oneDNN, C++
    and Python's threads have words of their own, and an import ends in a SystemError."""
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    if asked is None and not isinstance(error, MemoryError):
        free = free_bytes(torch.device("cpu"))
        has_their_words = isinstance(error, SystemError) or str(error).startswith(LIBRARIES)
        if not has_their_words or free is None or free > LITTLE:
            return None
    more = f", {asked[1]} more were asked for" if asked else ""
    return (
        f"out of memory{more}: free some, or take less with a smaller trainer.batch_size or data.max_length, or "
        "trainer.gradient_checkpointing=true"
    )


def _left_on_the_host() -> Iterator[int]:
    """By the system, by the limits of this process, and by those of its group, as a container has them."""
    yield _lines("/proc/meminfo")["MemAvailable"]
    own = _lines("/proc/self/status")
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
            yield max(0, most - own[used])
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        version = 2 if not names else 1
        if version == 2 or "memory" in names.split(","):
            mount = Path("/sys/fs/cgroup") / ("memory" if version == 1 else "")
            yield from _left_in_groups(mount, path, *CGROUPS[version])


def _left_in_groups(mount: Path, path: str, most: str, used: str, reclaimed: str) -> Iterator[int]:
    """In a group and in those that it is part of; a container may see its own as the first."""
    inside = mount / path.lstrip("/")
    for group in (inside, *inside.parents):
        if group.is_relative_to(mount) and (group / most).exists() and (limit := (group / most).read_text()) != "max\n":
            cached = re.search(rf"^{reclaimed} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            yield max(0, int(limit) - int((group / used).read_text()) + int(cached[1] if cached else 0))


def _lines(file: str) -> dict[str, int]:
    """The bytes that lines such as `VmData:  12 kB` tell."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", Path(file).read_text(), re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in found}
