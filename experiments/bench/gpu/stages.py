"""What is measured on a GPU: stages of cases, and the targets that their figures are held to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One model, trained by some sides.

    Attributes:
        preset: of conf/model: its shapes, with random weights.
        layers: so many of its layers; None: all.
        decodes: also time reading prompts and decoding, alone and sixteen at once.
        products: also time the products with frozen weights alone.
        alone: one side after the other, not in turn: a GPU of 80 GB does not hold both.
    """

    method: str
    preset: str = "llama-3-8b"
    layers: int | None = None
    batch: int = 4
    length: int = 512
    checkpointing: bool = False
    sides: tuple[str, ...] = ("ours", "peft")
    decodes: bool = False
    products: bool = False
    alone: bool = False
    rank: int = 16

    def __str__(self) -> str:
        layers = f" {self.layers} layers" if self.layers else ""
        return f"{self.preset}{layers} {self.method} {self.batch}×{self.length}"


@dataclass(frozen=True)
class Stage:
    """Cases whose sides share a process each. `limit`: seconds for all of them."""

    name: str
    limit: int
    cases: tuple[Case, ...] = ()
    linear: bool = False  # an adapted linear called eagerly beside plain torch's


ALL = ("ours", "peft", "liger", "unsloth")
EIGHT = {"layers": 8}  # unsloth loads from disk alone, and 32 layers take a minute to write
UNSLOTH = Case("qlora", **EIGHT, sides=ALL, decodes=True)
OURS8 = Case("qdora", **EIGHT, sides=("ours",))
LONG = Case("qlora", **EIGHT, batch=1, length=8192, checkpointing=True, sides=("ours", "unsloth"))
QLORA, QDORA = Case("qlora", decodes=True, products=True), Case("qdora", products=True)
LORA, DORA = Case("lora"), Case("dora", alone=True)
SMALL = Case("qdora", preset="smollm2-135m", batch=8, length=128)
LINEAR = "one adapted linear"

# Together as long as kernels.bench.card: both fit into a quarter of an hour. In the order of their worth.
STAGES = (
    Stage("quantized", 150, (QDORA, QLORA)),
    Stage("unsloth", 140, (UNSLOTH, OURS8, LONG)),
    Stage("small", 45, (SMALL,)),
    Stage("linear", 25, linear=True),
    Stage("dense", 60, (DORA, LORA)),
)
STEP, PEAK, HOST = "step_ms", "peak_gb", "host_us"


@dataclass(frozen=True)
class Cell:
    """A figure: of a case, or of LINEAR, a side and a metric."""

    case: Case | str
    side: str
    metric: str = STEP


@dataclass(frozen=True)
class Target:
    """A figure of ours over another, and the limit that this ratio is to keep: at most, or at least."""

    name: str
    ours: Cell
    other: Cell
    limit: float
    at_least: bool = False

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit


def _over(name: str, case: Case, side: str, limit: float, metric: str = STEP) -> Target:
    return Target(name, Cell(case, "ours", metric), Cell(case, side, metric), limit)


def _decoding(case: Case, side: str, limit: float) -> tuple[Target, ...]:
    return tuple(
        Target(
            f"decoding, batch {batch}, tokens/s over {side}",
            Cell(case, "ours", f"decode_{batch}"),
            Cell(case, side, f"decode_{batch}"),
            limit,
            at_least=True,
        )
        for batch in (1, 16)
    )


TARGETS = (
    _over("QLoRA, 8 layers, over unsloth", UNSLOTH, "unsloth", 0.70),
    Target("QDoRA, 8 layers, over unsloth's QLoRA", Cell(OURS8, "ours"), Cell(UNSLOTH, "unsloth"), 0.75),
    _over("QDoRA over PEFT + bitsandbytes", QDORA, "peft", 0.30),
    _over("QLoRA over PEFT + bitsandbytes", QLORA, "peft", 0.55),
    _over("DoRA over PEFT", DORA, "peft", 0.30),
    _over("LoRA over PEFT", LORA, "peft", 0.65),
    Target("QDoRA over its bare products", Cell(QDORA, "ours"), Cell(QDORA, "ours", "products_ms"), 1.5),
    Target("QLoRA over its bare products", Cell(QLORA, "ours"), Cell(QLORA, "ours", "products_ms"), 1.5),
    Target("QDoRA over our QLoRA", Cell(QDORA, "ours"), Cell(QLORA, "ours"), 1.07),
    _over("SmolLM2's shape, 8×128, QDoRA over PEFT", SMALL, "peft", 1 / 30),
    _over("QLoRA, 1×8192, checkpointing, over unsloth", LONG, "unsloth", 0.80),
    _over("peak memory, QLoRA, over unsloth", UNSLOTH, "unsloth", 1.0, PEAK),
    Target(
        "eager linear, host time over plain torch",
        Cell(LINEAR, "ours", "host_us"),
        Cell(LINEAR, "torch", "host_us"),
        1.0,
    ),
    *_decoding(QLORA, "peft", 8),
    *_decoding(UNSLOTH, "unsloth", 1.2),
)
