"""Means over seeds, paired differences with a confidence interval, and the cheapest settings."""

import itertools
import math
from dataclasses import dataclass

import numpy
from scipy import stats

from experiments.runs.groups import Group, Run

LEVEL = 0.95


@dataclass
class Mean:
    """A mean over seeds and their standard deviation (n − 1 in the denominator): NaN for one seed, both for none."""

    mean: float
    std: float
    n: int

    def scaled(self, factor: float) -> "Mean":
        return Mean(self.mean * factor, self.std * factor, self.n)


def mean(runs: list[Run], measure: str) -> Mean:
    """The mean of `measure` over the runs that have it."""
    values = [run.measures[measure] for run in runs if measure in run.measures]
    if not values:
        return Mean(math.nan, math.nan, 0)
    return Mean(
        float(numpy.mean(values)), float(numpy.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values)
    )


@dataclass
class Difference:
    """Of pairs of runs: the mean of b − a, and Student's interval for it; NaN bounds for one pair."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def difference(pairs: list[tuple[Run, Run]], measure: str = "loss_after") -> Difference:
    """Of `measure` over pairs (a, b). With a shared seed two runs see the same data in the same order, and what that
    does to both cancels."""
    d = numpy.array([b.measures[measure] - a.measures[measure] for a, b in pairs])
    if len(d) < 2:
        return Difference(float(d.mean()), math.nan, math.nan, len(d))
    half = stats.t.ppf((1 + LEVEL) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return Difference(float(d.mean()), float(d.mean() - half), float(d.mean() + half), len(d))


def by_seed(a: list[Run], b: list[Run]) -> list[tuple[Run, Run]]:
    seeds = {run.seed: run for run in b}
    return [(run, seeds[run.seed]) for run in a if run.seed in seeds]


def method_differences(group: Group) -> list[tuple[str, str, str, Difference]]:
    """(shared setting, method a, method b, difference) of each two methods, where all else that both have is equal."""
    others = [key for key in group.varied if key != "method.name"]
    methods = list(dict.fromkeys(run.method for run in group.runs))
    rows = []
    for a, b in itertools.combinations(methods, 2):
        found: dict[str, list[tuple[Run, Run]]] = {}
        for one, other in itertools.product(group.runs, group.runs):
            if (one.method, other.method) != (a, b) or one.seed != other.seed:
                continue
            if all(one.config[k] == other.config[k] for k in others if k in one.config and k in other.config):
                fuller = max(one, other, key=lambda run: sum(key in run.config for key in others))
                found.setdefault(group.label(fuller, without=("method.name",)), []).append((one, other))
        rows += [(setting, a, b, difference(pairs)) for setting, pairs in found.items()]
    return rows


SAME_COST = 0.01  # of the largest cost: a measured time or memory does not tell smaller differences


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The labels on the Pareto front, cheapest first: no other point costs as little and has as low a loss.

    Args:
        points: (cost, loss) by label. Costs that are closer than SAME_COST count as the same.
    """
    same = SAME_COST * max((abs(cost) for cost, _ in points.values()), default=0.0)
    by_loss = sorted(points.items(), key=lambda item: (item[1][1], item[1][0]))
    cheapest, labels = math.inf, []
    for label, (cost, _) in by_loss:  # best first: a worse one has to be cheaper
        if cost < cheapest - same:
            cheapest = cost
            labels.append(label)
    return labels[::-1]


@dataclass
class Verdict:
    """The conclusion from a group's runs.

    Attributes:
        best: the setting with the lowest mean held-out loss.
        against: the difference of every other setting from it, over the seeds that both have.
        level_with: those whose interval holds 0, so that the seeds do not tell them from the best; itself included.
        unknown: those with fewer than two common seeds, of which nothing can be said.
    """

    best: str
    against: dict[str, Difference]
    level_with: list[str]
    unknown: list[str]

    def cheapest(self, settings: dict[str, list[Run]], measure: str) -> str:
        return min(self.level_with, key=lambda label: mean(settings[label], measure).mean)


def verdict(settings: dict[str, list[Run]]) -> Verdict:
    best = min(settings, key=lambda label: mean(settings[label], "loss_after").mean)
    against, level, unknown = {}, [best], []
    for label, runs in settings.items():
        if label == best:
            continue
        pairs = by_seed(settings[best], runs)
        if len(pairs) < 2:
            unknown.append(label)
            if not pairs:
                continue
        against[label] = difference(pairs)
        if len(pairs) > 1 and not against[label].certain:
            level.append(label)
    return Verdict(best, against, level, unknown)
