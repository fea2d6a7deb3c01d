"""Reads cubins, NVIDIA's ELF files of compiled kernels: machine code, registers, stack, shared memory."""

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import triton

_ADDRESS = re.compile(r"\s+/\*([0-9a-f]{4,})\*/")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Usage:
    registers: int  # a thread
    stack_bytes: int  # a thread
    shared_bytes: int  # a block, those known at compile time


def usage(cubin: bytes, kernel: str) -> Usage:
    """The registers and the memory that `kernel` of `cubin` takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    return Usage(*map(int, _USAGE.search(listing, listing.index(f"Function {kernel}:")).groups()))


def text_section(cubin: bytes, kernel: str) -> bytes:
    """The machine code of `kernel`.

    Raises:
        ValueError: there is no such kernel in `cubin`.
    """
    (table,) = struct.unpack_from("<Q", cubin, 40)  # ELF64 header: e_shoff; e_shentsize, e_shnum, e_shstrndx
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # section header: sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        if cubin[start : cubin.index(b"\0", start)] == f".text.{kernel}".encode():
            return cubin[offset : offset + length]
    raise ValueError(f"no kernel {kernel} in the cubin")


def disassemble(texts: list[bytes], capability: int) -> list[str]:
    """SASS listings of machine code, as `machine_code.parse_sass` reads them.

    One call reads all of them, because nvdisasm takes half a second to start. Addresses go on from one listing to the
    next.
    """
    if not texts:
        return []
    arch = f"SM{capability}{'a' if capability >= 90 else ''}"  # with the matrix instructions of that very GPU
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        listing = _run(triton.knobs.nvidia.nvdisasm.path, "--binary", arch, file.name)
    ends = list(accumulate(map(len, texts)))
    lines: list[list[str]] = [[] for _ in texts]
    for line in listing.splitlines():
        if address := _ADDRESS.match(line):
            lines[bisect_right(ends, int(address[1], 16))].append(line)
    return ["\n".join(part) + "\n" for part in lines]


def extract(library: Path, target: str) -> bytes:
    """The cubin for `target` ("sm_80") in a shared library.

    Raises:
        FileNotFoundError: the library has no code for the target.
    """
    with tempfile.TemporaryDirectory() as directory:
        _run(triton.knobs.nvidia.cuobjdump.path, "-xelf", f".{target}.", str(library.resolve()), cwd=directory)
        found = sorted(Path(directory).iterdir())
        if not found:
            raise FileNotFoundError(f"{library.name} has no code for {target}")
        return found[0].read_bytes()


def _run(*command: str, cwd: str | None = None) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout
