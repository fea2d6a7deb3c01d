"""The comparisons that are made, and a line of their results."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One comparison of training."""

    method: str
    rank: int = 16
    batch: int = 4
    length: int = 128
    model: str = "SmolLM2-135M"

    def __str__(self) -> str:
        return f"{self.model} {self.method} r={self.rank} {self.batch}×{self.length}"


CASES = (
    *(Case(method) for method in ("qdora", "dora", "qlora", "lora")),
    *(Case("qdora", batch=batch, length=length) for batch, length in ((1, 512), (8, 64))),
    *(Case("qdora", rank=rank) for rank in (4, 64)),
    Case("qdora", model="Qwen3-like"),
)


@dataclass(frozen=True)
class Row:
    """A line of the CSV file: one side of one comparison; ratio is theirs over ours of the metric (speed: inverse)."""

    case: str
    metric: str
    side: str
    p20: float
    p50: float
    p80: float
    ratio: float
    note: str = ""
