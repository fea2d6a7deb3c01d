"""Reading compiled kernels: instructions, the path that a thread takes through them, widths of loads and stores.

Instructions are counted in the same way for SASS (NVIDIA) and AMD assembly, without NOPs:
    Without a loop: take the paths from entry to exit that store the most to global memory. Count the shortest of them.
                    This skips rare cases (a tail, a slow division, an out-of-line call). Predicated instructions
                    count, a predicated exit is not taken, and loops beside that path count once.
    With a loop:    count likewise from the head to the back edge of the longest innermost loop. A loop that ptxas
                    unrolled further counts as one trip: too high rather than too low.
"""

import re
from dataclasses import dataclass

_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
_AMD = re.compile(r"^(?:(\.L\w+):|\t([a-z]\w+)(?:[ \t]+(.*))?)", re.M)
_AMD_LOAD_STORE = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:[su]?(byte|short|dword)(?:x(\d))?|[ub](\d+))")
_MMA = re.compile(r"[HIQOD]?MMA\b|[HIQ]GMMA|UTC\w*MMA|v_s?mfma_")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    target: int | None = None  # index of the instruction it may branch to
    falls_through: bool = True  # the next instruction may follow
    exits: bool = False


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of a `cuobjdump -sass` listing of one kernel."""
    rows = [row for row in _SASS.findall(text) if row[2] != "NOP"]
    index = {int(address, 16): i for i, (address, *_) in enumerate(rows)}
    code = []
    for _, predicate, opcode, operands in rows:
        name = opcode.split(".")[0]
        if name == "BRA":
            words = operands.replace(",", " ").split()
            *conditions, target = [word for word in words if word[0] not in "?&"]  # without hints for scheduling
            conditional = bool(predicate) or bool(conditions)
            code.append(Instruction(opcode, index.get(int(target, 16)), conditional))
        elif name == "CALL" and _exits(rows, index, operands):  # so does ptxas at times leave a loop
            code.append(Instruction(opcode, index[int(operands, 16)], bool(predicate)))
        elif name == "EXIT" and not predicate:
            code.append(Instruction(opcode, falls_through=False, exits=True))
        else:
            code.append(Instruction(opcode, falls_through=name not in ("RET", "BRX", "JMX")))
    return code


def _exits(rows: list, index: dict[int, int], operands: str) -> bool:
    """True if `operands` are the address of an EXIT."""
    return operands.startswith("0x") and (i := index.get(int(operands, 16))) is not None and rows[i][2] == "EXIT"


def parse_amd(text: str) -> list[Instruction]:
    """Instructions of the AMD assembly of one kernel."""
    rows: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for label, opcode, operands in _AMD.findall(text):
        if label:
            labels[label] = len(rows)
        elif opcode not in ("s_nop", "s_code_end"):
            rows.append((opcode, operands.split(";")[0].strip()))
    code = []
    for opcode, operands in rows:
        if opcode.startswith(("s_branch", "s_cbranch")):
            code.append(Instruction(opcode, labels.get(operands), opcode.startswith("s_cbranch")))
        else:
            ends = opcode == "s_endpgm"
            code.append(Instruction(opcode, falls_through=not ends, exits=ends))
    return code


def count_path(code: list[Instruction], loop: bool) -> int:
    """Instructions on the path described at the top of this file.

    Raises:
        ValueError: there is no such path, or no loop.
    """
    if not loop:
        return _path(code, 0, {i for i, instruction in enumerate(code) if instruction.exits})
    edges = [(i.target, end) for end, i in enumerate(code) if i.target is not None and i.target < end]
    innermost = [
        (head, end)
        for head, end in edges
        if not any(head <= other and last <= end and (other, last) != (head, end) for other, last in edges)
    ]
    if not innermost:
        raise ValueError("the machine code has no loop")
    head, end = max(innermost, key=lambda edge: edge[1] - edge[0])
    return _path(code, head, {end})


def _path(code: list[Instruction], start: int, ends: set[int]) -> int:
    best: dict[int, tuple[int, int]] = {}  # from an instruction on: (bits stored, minus instructions)
    for i in range(max(ends), start - 1, -1):
        kind, bits = _access(code[i].opcode)
        stored = bits if kind == "store" else 0
        follow = [code[i].target] if code[i].target is not None else []
        if code[i].falls_through:
            follow.append(i + 1)
        onward = [(0, 0)] if i in ends else [best[j] for j in follow if j > i and j in best]
        if onward:
            bits_after, minus_count = max(onward)
            best[i] = (stored + bits_after, minus_count - 1)
    if start not in best:
        raise ValueError("the machine code has no path to its end")
    return -best[start][1]


def access_bits(code: list[Instruction]) -> tuple[int, int]:
    """Widest (load from, store to) global memory, in bits a thread."""
    widest = {"load": 0, "store": 0}
    for instruction in code:
        kind, bits = _access(instruction.opcode)
        if kind:
            widest[kind] = max(widest[kind], bits)
    return widest["load"], widest["store"]


def _access(opcode: str) -> tuple[str | None, int]:
    name, *suffixes = opcode.split(".")
    if name in ("LDG", "LDGSTS", "STG"):
        kind = "store" if name == "STG" else "load"
        sizes = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        return kind, next((sizes[suffix] for suffix in suffixes if suffix in sizes), 32)
    if match := _AMD_LOAD_STORE.match(opcode):
        kind, word, count, bits = match.groups()
        return kind, int(bits) if bits else {"byte": 8, "short": 16, "dword": 32}[word] * int(count or 1)
    return None, 0


def spilled_bytes(code: list[Instruction]) -> int:
    """Bytes a thread stores to local memory, on NVIDIA GPUs."""
    spills = (i.opcode for i in code if i.opcode.startswith("STL"))
    return sum(16 if ".128" in opcode else 8 if ".64" in opcode else 4 for opcode in spills)


def uses_mma(code: list[Instruction]) -> bool:
    return any(_MMA.match(i.opcode) for i in code)
