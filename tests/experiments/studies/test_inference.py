"""Paired differences, Holm's correction and power, against scipy, R's documented values and simulations."""

import itertools
import math

import numpy
import pytest
from scipy import stats

from experiments.studies.inference import (
    Variances,
    holm,
    mean,
    paired,
    seeds_needed,
    smallest_visible,
    variances,
)


def table(rng, seeds=4, samples=60, *, shift=0.0, seed=1.0, sample=1.0, rest=1.0):
    """Differences whose mean and standard deviations are known."""
    return (
        shift
        + seed * rng.normal(size=(seeds, 1))
        + sample * rng.normal(size=(1, samples))
        + rest * rng.normal(size=(seeds, samples))
    )


def test_variances_are_those_that_made_the_table():
    rng, weights = numpy.random.default_rng(1), numpy.ones(80)
    found = [variances(table(rng, 6, 80, seed=0.5, sample=2, rest=1), weights) for _ in range(200)]
    assert numpy.mean([one.seed for one in found]) == pytest.approx(0.25, rel=0.1)
    assert numpy.mean([one.sample for one in found]) == pytest.approx(4, rel=0.05)
    assert numpy.mean([one.rest for one in found]) == pytest.approx(1, rel=0.05)


def test_with_seeds_alone_it_is_the_paired_t_test():
    rng = numpy.random.default_rng(2)
    by_seed = 0.6 + rng.normal(size=(8, 1))
    found = paired(by_seed + numpy.zeros((1, 50)), numpy.ones(50), draws=100_000)
    exact = stats.ttest_1samp(by_seed[:, 0], 0)
    low, high = exact.confidence_interval(0.95)
    width = high - low
    assert found.mean == pytest.approx(by_seed.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * width), "the bootstrap keeps the skew"
    assert found.p == pytest.approx(exact.pvalue, abs=0.02)


def test_a_loss_is_a_mean_over_tokens():
    rng = numpy.random.default_rng(3)
    d, tokens = rng.normal(size=(3, 40)), rng.integers(1, 50, 40).astype(float)
    assert mean(d, tokens) == pytest.approx(numpy.average(d.mean(axis=0), weights=tokens))
    spread = [
        mean(d[:, chosen], tokens[chosen]) for chosen in (rng.integers(0, 40, 40) for _ in range(4000))
    ]  # of samples alone: the variance of the ratio of sums, by brute force
    of_samples = variances(numpy.repeat(d.mean(axis=0, keepdims=True), 3, axis=0), tokens)
    assert of_samples.seed == 0 == pytest.approx(of_samples.rest)
    assert of_samples.of_mean(3, 40) == pytest.approx(numpy.var(spread), rel=0.2)


@pytest.mark.parametrize(("seed", "sample", "rest"), [(1, 0, 1), (0.05, 1, 0.5), (0.3, 1, 1), (0, 0, 1)])
def test_intervals_cover_the_truth_as_often_as_they_say(seed, sample, rest):
    rng, weights = numpy.random.default_rng(4), numpy.ones(60)
    found = [paired(table(rng, shift=0.7, seed=seed, sample=sample, rest=rest), weights, draws=400) for _ in range(250)]
    covered = numpy.mean([one.low <= 0.7 <= one.high for one in found])
    assert 0.92 <= covered <= 0.985, covered
    assert all((one.p < 0.05) == (one.low > 0 or one.high < 0) for one in found if abs(one.p - 0.05) > 0.005)


def test_holm_is_r_s_and_keeps_the_familywise_error():
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx(
        [0.05, 0.08, 0.09, 0.09, 0.09]
    )  # R: p.adjust(…, "holm")
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06]) and holm([0.9, 0.8]) == [1.0, 1.0]
    for p in itertools.permutations([0.004, 0.02, 0.6]):  # by definition: reject while p ≤ α/(k - rejected)
        for alpha in (0.01, 0.013, 0.05, 0.2, 0.7):
            left, rejected = sorted(p), set()
            while left and left[0] <= alpha / len(left):
                rejected.add(left.pop(0))
            assert {value for value, adjusted in zip(p, holm(list(p))) if adjusted <= alpha} == rejected
    rng, weights, wrong = numpy.random.default_rng(5), numpy.ones(60), 0
    for _ in range(150):
        family = [paired(table(rng, seed=0.2), weights, draws=400).p for _ in range(4)]
        wrong += min(holm(family)) < 0.05
    assert wrong / 150 <= 0.08


def test_power_is_that_of_the_t_test_and_of_a_simulation():
    alone = Variances(seed=1.0, sample=0.0, rest=0.0, seeds=3, samples=9)
    size = smallest_visible(alone, 10, 200)
    assert size == pytest.approx(0.9960, abs=2e-3)  # Cohen's d of a one-sample t-test of 10, two-sided, power 0.8
    assert seeds_needed(alone, 200, 0.5) == 34  # likewise: 33.4 by G*Power and statsmodels' TTestPower
    assert smallest_visible(alone, 10, 200, alpha=0.01) > size > smallest_visible(alone, 20, 200)
    assert seeds_needed(Variances(0, 1.0, 0, 3, 9), 100, 0.1) is None, "samples are too few, whatever the seeds"
    assert smallest_visible(Variances(0, 0, 0, 3, 9), 2, 2) == 0
    made, rng = {"seed": 0.2, "sample": 1.0, "rest": 1.0}, numpy.random.default_rng(6)
    true = Variances(0.04, 1.0, 1.0, 4, 60)
    shift = smallest_visible(true, 4, 60)
    seen = [paired(table(rng, shift=shift, **made), numpy.ones(60), draws=400).p < 0.05 for _ in range(250)]
    assert numpy.mean(seen) == pytest.approx(0.8, abs=0.06)


def test_equal_runs_and_single_seeds():
    nothing = paired(numpy.zeros((3, 5)), numpy.ones(5))
    assert (nothing.mean, nothing.low, nothing.high, nothing.p) == (0, 0, 0, 1) and not math.isnan(nothing.visible())
    with pytest.raises(ValueError, match="1 seeds and 5 samples"):
        paired(numpy.zeros((1, 5)), numpy.ones(5))
