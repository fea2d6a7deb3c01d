"""What a run keeps of the time before a stop."""

from dataclasses import dataclass, field

from experiments.training.evaluation import Evaluation


@dataclass
class BeforeStop:
    """The part of a run that cannot be measured again after a stop. Checkpoints keep it.

    Attributes:
        before: the evaluation before training.
        texts_before: the answers to the sample prompts before training.
        measures_before: exact match and the second domain's loss before training.
        seconds: the time of the run until the stop.
        joules: the energy of the run until the stop; None: the machine does not tell.
        tracker_id: the tracker's name for the run.
        metrics: the checksum of the records of metrics.jsonl.
    """

    before: Evaluation | None = None
    texts_before: list[str] | None = None
    measures_before: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    joules: float | None = 0.0
    tracker_id: str | None = None
    metrics: str | None = None

    @classmethod
    def of_checkpoint(cls, saved: dict) -> "BeforeStop":
        """The object that `asdict` made `saved` of."""
        return cls(**saved | {"before": Evaluation(**saved["before"])})
