"""Paired differences over seeds and held-out samples, many of them at once, and the smallest one that can be seen.

Two settings that share seeds and held-out samples give a table of differences d[s, i], of n seeds and m samples. Both
are drawn from many, so

    d[s, i] = mean + seed[s] + sample[i] + rest[s, i]
    Var(average) = Var(seed)/n + Var(sample)/m + Var(rest)/(n·m)

The three variances come from the mean squares of a two-way table (Searle, Casella and McCulloch 1992, "Variance
Components", ch. 4). The interval's shape is that of a bootstrap which draws seeds and samples anew (Owen 2007, "The
pigeonhole bootstrap"), its width that of the variance above and Student's t: few seeds, drawn with replacement, vary
too little (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). The degrees of freedom are
Satterthwaite's.
"""

import math
from dataclasses import dataclass

import numpy
from numpy import ndarray
from scipy import optimize, stats

LEVEL, POWER = 0.95, 0.8
DRAWS, SEED = 10_000, 0  # of the bootstrap
MOST_SEEDS = 1000  # that are looked at


@dataclass(frozen=True)
class Variances:
    """Of differences: the variances of seeds, samples and the rest, and how many seeds and samples are behind them."""

    seed: float
    sample: float
    rest: float
    seeds: int
    samples: int

    def of_mean(self, seeds: int, samples: int) -> float:
        """The variance of an average over so many seeds and samples."""
        return self.seed / seeds + self.sample / samples + self.rest / (seeds * samples)

    def freedom(self, seeds: int, samples: int) -> float:
        """The degrees of freedom of that variance, if it were estimated from so many seeds and samples."""
        parts = (
            (self.seed / seeds, seeds - 1),
            (self.sample / samples, samples - 1),
            (self.rest / (seeds * samples), (seeds - 1) * (samples - 1)),
        )
        whole = sum(variance for variance, _ in parts)
        if not whole:
            return math.inf
        return whole**2 / sum(variance**2 / freedom for variance, freedom in parts if variance)


def variances(table: ndarray, weights: ndarray) -> Variances:
    """The variances in a table of differences.

    Args:
        table: float [seeds, samples], two or more of each.
        weights: float [samples], how much a sample counts in the mean: its tokens, for a loss a token.
    """
    n, m = table.shape
    if min(n, m) < 2:
        raise ValueError(f"{n} seeds and {m} samples: their variances need two of each")
    u = (table - mean(table, weights)) * weights / weights.mean()  # the mean of u is what moves the ratio of sums
    rows, columns, whole = u.mean(axis=1, keepdims=True), u.mean(axis=0, keepdims=True), u.mean()
    of_rows = m * numpy.square(rows - whole).sum() / (n - 1)
    of_columns = n * numpy.square(columns - whole).sum() / (m - 1)
    rest = numpy.square(u - rows - columns + whole).sum() / ((n - 1) * (m - 1))
    return Variances(
        max(0.0, float(of_rows - rest) / m), max(0.0, float(of_columns - rest) / n), float(rest), n, m
    )  # fmt: skip


def mean(table: ndarray, weights: ndarray) -> float:
    return float((table @ weights).sum() / (len(table) * weights.sum()))


@dataclass(frozen=True)
class Paired:
    """A mean difference with its interval at LEVEL, and the two-sided p of no difference."""

    mean: float
    low: float
    high: float
    p: float
    variances: Variances

    def visible(self, alpha: float = 1 - LEVEL) -> float:
        """The smallest difference that such a comparison sees."""
        return smallest_visible(self.variances, self.variances.seeds, self.variances.samples, alpha)


def paired(table: ndarray, weights: ndarray, draws: int = DRAWS) -> Paired:
    """The mean of a table of differences, as `variances` takes it, with its interval and p.

    The interval leaves out 0 if and only if p < 1 - LEVEL.
    """
    found, middle = variances(table, weights), mean(table, weights)
    n, m = table.shape
    deviation = math.sqrt(found.of_mean(n, m))
    if deviation <= 1e-12 * max(1.0, abs(middle)):  # equal in every run, up to rounding
        return Paired(middle, middle, middle, 1.0 if abs(middle) < 1e-12 else 0.0, found)
    rng = numpy.random.default_rng(SEED)
    of_seeds = rng.multinomial(n, [1 / n] * n, size=draws)
    of_samples = rng.multinomial(m, [1 / m] * m, size=draws) * weights
    drawn = ((of_seeds @ table) * of_samples).sum(axis=1) / (n * of_samples.sum(axis=1))
    shape = (drawn - drawn.mean()) / drawn.std()
    freedom = found.freedom(n, m)
    off = deviation * shape / numpy.sqrt(rng.chisquare(freedom, size=draws) / freedom)
    low, high = numpy.quantile(off, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min((off <= -middle).sum(), (off >= -middle).sum())
    return Paired(middle, middle + float(low), middle + float(high), min(1.0, 2 * (beyond + 1) / (draws + 1)), found)


def holm(p: list[float]) -> list[float]:
    """The p of several comparisons, corrected: one is below α by chance with probability α at most. (Holm 1979)"""
    order = sorted(range(len(p)), key=p.__getitem__)
    corrected, largest = [0.0] * len(p), 0.0
    for place, which in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[which]))
        corrected[which] = largest
    return corrected


def smallest_visible(found: Variances, seeds: int, samples: int, alpha: float = 1 - LEVEL) -> float:
    """The difference that a two-sided test at `alpha` sees with probability POWER, with so many seeds and samples."""
    deviation = math.sqrt(found.of_mean(seeds, samples))
    if not deviation:
        return 0.0
    freedom = min(found.freedom(seeds, samples), 1e6)
    bound = stats.t.ppf(1 - alpha / 2, freedom)

    def lack(size: float) -> float:
        wrong_side = numpy.nan_to_num(stats.nct.cdf(-bound, freedom, size))  # scipy's is NaN where it is next to 0
        return stats.nct.sf(bound, freedom, size) + wrong_side - POWER

    enough = bound
    while lack(enough) < 0:
        enough *= 1.5
    return deviation * float(optimize.brentq(lack, 1e-6, enough))


def seeds_needed(found: Variances, samples: int, target: float, alpha: float = 1 - LEVEL) -> int | None:
    """The fewest seeds that make a difference of `target` visible; None: no number of seeds does."""
    if smallest_visible(found, MOST_SEEDS, samples, alpha) > target:
        return None
    few, many = 1, MOST_SEEDS  # too few, enough
    while many - few > 1:
        middle = (few + many) // 2
        if smallest_visible(found, middle, samples, alpha) > target:
            few = middle
        else:
            many = middle
    return max(many, 2)
