"""What a run measures before training. Runs that start with the same model find the same: a sweep measures it once."""

import json
from dataclasses import dataclass

from experiments.config import Config, flat
from experiments.data.chat import Example
from experiments.runs.heldout import name_of
from experiments.training.evaluation import Evaluation

# Keys that change only what training does. Any other key, also one that is added later, counts.
OF_TRAINING = (
    *("lr", "method.lr", "trainer.steps", "trainer.warmup", "trainer.schedule", "trainer.weight_decay"),
    *("trainer.loraplus_lr_ratio", "trainer.batch_size", "trainer.grad_accum", "trainer.max_grad_norm"),
)


@dataclass
class Before:
    """Attributes:
    evaluation: the held-out loss.
    texts: the answers to the sample prompts.
    measures: exact match and the second domain's loss.
    seconds, joules: what that took; other runs count it as theirs, so that it does not matter which came first.
    """

    evaluation: Evaluation
    texts: list[str]
    measures: dict[str, float]
    seconds: float
    joules: float | None


def start_of(cfg: Config, measured: list[Example]) -> str:
    """A key that runs share which start with the same model and measure it on the same samples. An adapter whose B
    starts as zero changes nothing, whatever the seed makes of A."""
    drawn = cfg.init != "default" or cfg.model.source == "tiny" or cfg.model.weights is not None
    left_out = OF_TRAINING if drawn else (*OF_TRAINING, "seed")
    values = {key: value for key, value in flat(cfg).items() if key not in left_out}
    values["samples"] = [name_of(example) for example in measured]  # a file of data may change between two runs
    return json.dumps(values, sort_keys=True)
