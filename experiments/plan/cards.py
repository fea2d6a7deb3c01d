"""Common GPUs: their memory, and the speed of their matrix units in bf16, or fp16 where they have no bf16.

Memory is the driver's figure (nvidia-smi, rocm-smi), in MiB; TFLOP/s are the data sheets', dense, with fp32 sums.
"""

from typing import NamedTuple

from experiments.errors import UserError

RESERVE = 2**30  # bytes of each that are not torch's to give: CUDA context, library workspaces, fragmentation


class Card(NamedTuple):
    name: str
    mib: int
    tflops: float
    bf16: bool = True  # its matrix units take it; others take fp16, of as many bytes

    @property
    def usable_bytes(self) -> int:
        return self.mib * 2**20 - RESERVE


CARDS = {
    "t4": Card("T4, 16 GB", 15360, 65.0, bf16=False),
    "rtx4080": Card("RTX 4080, 16 GB", 16376, 97.5),
    "rtx3090": Card("RTX 3090, 24 GB", 24576, 71.0),
    "rtx4090": Card("RTX 4090, 24 GB", 24564, 165.2),
    "l4": Card("L4, 24 GB", 23034, 121.0),
    "rtx5090": Card("RTX 5090, 32 GB", 32607, 209.5),
    "a100-40": Card("A100, 40 GB", 40960, 312.0),
    "l40s": Card("L40S, 48 GB", 46068, 362.0),
    "a6000": Card("RTX A6000, 48 GB", 49140, 154.8),
    "a100": Card("A100, 80 GB", 81920, 312.0),
    "h100": Card("H100, 80 GB", 81559, 989.0),
    "h200": Card("H200, 141 GB", 143771, 989.0),
    "b200": Card("B200, 180 GB", 183359, 2250.0),
    "mi300x": Card("MI300X, 192 GB", 196592, 1307.0),
}


def card(name: str) -> Card:
    """The card of that name.

    Raises:
        UserError: no card has it.
    """
    if name not in CARDS:
        raise UserError(f"gpu={name}: choose one of {', '.join(CARDS)}")
    return CARDS[name]
