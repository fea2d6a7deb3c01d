"""Two settings of a study compared: from the files of their runs to a paired difference."""

import math
from collections.abc import Callable

import numpy
from numpy import ndarray

from experiments.errors import UserError
from experiments.runs.groups import Run
from experiments.runs.heldout import Samples
from experiments.studies.inference import Paired, paired, seeds_needed, variances

EQUAL_SHARE = 0.15  # by which "equal" numbers of parameters may differ

Runs = dict[int, Run]  # of one setting, by seed
SamplesOf = Callable[[Run], Samples]  # reads the measures of a run's held-out samples


def table(a: Runs, b: Runs, samples: SamplesOf, measure: str) -> tuple[ndarray, ndarray] | None:
    """The differences b - a of a measure [seeds, samples] over the seeds that both have, and the samples' weights.
    None: fewer than two seeds, or a measure that the runs do not have.

    Raises:
        ValueError: a heldout.csv cannot be read, or the runs were measured on different samples.
    """
    rows, weights, names = [], None, None
    for seed in sorted(a.keys() & b.keys()):
        one, other = samples(a[seed]), samples(b[seed])
        if measure not in one.values or measure not in other.values:
            return None
        names, weights = names or one.names, one.weights[measure]
        if not names == one.names == other.names:
            raise ValueError(f"{a[seed].name} and {b[seed].name} were measured on different samples")
        rows.append(other.values[measure] - one.values[measure])
    return (numpy.array(rows), weights) if len(rows) > 1 else None


def compare(a: Runs, b: Runs, samples: SamplesOf, measure: str) -> Paired | None:
    """The paired difference b - a; None where `table` is."""
    found = table(a, b, samples, measure)
    return None if found is None else paired(*found)


def needed(a: Runs, b: Runs, samples: SamplesOf, measure: str, target: float, most: int) -> int:
    """The seeds that a comparison needs to see a difference of `target`: `most` at most, 0 if it cannot be made."""
    found = table(a, b, samples, measure)
    if found is None:
        return 0
    enough = seeds_needed(variances(*found), found[0].shape[1], target)
    return most if enough is None else min(enough, most)


def level(runs: dict[float, Run], samples: SamplesOf) -> list[float]:
    """The learning rates that are level with the best, the lowest first: whose loss is higher by no more than the
    standard error of that difference over samples (the one-standard-error rule, Breiman et al. 1984, "Classification
    and Regression Trees", ch. 3.4.3).

    Raises:
        UserError: the runs were measured on different samples.
    """
    best = min(runs, key=lambda lr: runs[lr].measures["loss_after"])
    known, found = samples(runs[best]), []
    for lr in sorted(runs):
        other = samples(runs[lr])
        if other.names != known.names:
            raise UserError(f"{runs[lr].name} and {runs[best].name} were measured on different samples: delete one")
        weights = known.weights["loss"] / known.weights["loss"].mean()
        excess = (other.values["loss"] - known.values["loss"]) * weights
        if excess.mean() <= excess.std(ddof=1) / math.sqrt(len(excess)):  # the best one's is 0
            found.append(lr)
    return found


def why_unequal(a: Runs, b: Runs) -> str | None:
    """Why the runs do not have about equal numbers of trained parameters; None: they do."""
    one, other = (next(iter(runs.values())).measures["trainable_params"] for runs in (a, b))
    if abs(one - other) <= EQUAL_SHARE * min(one, other):
        return None
    return f"{one:,.0f} and {other:,.0f} trained parameters are not within {EQUAL_SHARE:.0%}"


def rise_at(points: list[tuple[float, float]], gain: float) -> float | None:
    """What was forgotten where a path of (gain, rise), which begins at (0, 0), first reaches a gain; None: nowhere."""
    before = (0.0, 0.0)
    for point in points:
        if point[0] >= gain:
            share = (gain - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return None
