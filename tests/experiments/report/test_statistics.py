"""Means, paired differences and their verdicts, against numpy and scipy."""

import math

import numpy
import pytest
from scipy import stats

from experiments.report.statistics import by_seed, difference, front, mean, method_differences, verdict
from tests.experiments.made_up_results import LOSSES, groups_of


def test_statistics_are_those_of_numpy_and_scipy(results):
    [one] = groups_of(results)
    settings = one.settings()
    m = mean(settings["lora rank=4"], "loss_after")
    assert (m.mean, m.std, m.n) == (
        pytest.approx(numpy.mean([2.90, 2.94, 2.93])),
        pytest.approx(0.0208167, rel=1e-4),
        3,
    )
    assert math.isnan(mean(settings["full"][:1], "loss_after").std)

    d = difference(by_seed(settings["lora rank=16"], settings["qdora rank=16"]))
    exact = stats.ttest_rel(LOSSES["qdora", 16], LOSSES["lora", 16])
    assert (d.mean, d.n) == (pytest.approx(numpy.mean([0.01, -0.005, 0.006])), 3)
    assert (d.low, d.high) == pytest.approx(tuple(exact.confidence_interval(0.95)))
    assert not d.certain and math.isnan(difference(by_seed(settings["full"], settings["full"][:1])).low)

    rows = {(setting, a, b): d for setting, a, b, d in method_differences(one)}
    assert rows["rank=4", "lora", "qdora"].mean == pytest.approx(numpy.mean([0.01, 0.02, 0.01]))
    assert rows["rank=16", "full", "lora"].mean == pytest.approx(numpy.mean([-0.06, -0.04, -0.06]))
    assert len(rows) == 6 and all(d.n == 3 for d in rows.values())


def test_the_verdict_names_what_the_seeds_do_not_tell_apart(results):
    [one] = groups_of(results)
    found = verdict(one.settings())
    assert found.best == "lora rank=16" and set(found.level_with) == {"lora rank=16", "qdora rank=16"}
    assert found.cheapest(one.settings(), "train_seconds") == "lora rank=16" and not found.unknown
    assert found.against["full"].mean == pytest.approx(numpy.mean([0.06, 0.04, 0.06]))


def test_the_pareto_front():
    points = {"a": (1, 3.0), "b": (2, 2.0), "worse": (2, 2.5), "dear": (3, 2.0), "c": (4, 1.0)}
    assert front(points) == ["a", "b", "c"]


def test_costs_that_are_the_same_within_noise_make_no_front():
    gb = 1e9
    points = {"a": (2.6000 * gb, 3.0), "b": (2.6001 * gb, 2.0), "c": (2.7 * gb, 1.9)}
    assert front(points) == ["b", "c"] and front({"a": (1.0, 1.0)}) == ["a"] and front({}) == []
    assert front({"forgets": (0.5, 2.0), "gains": (-0.4, 2.1)}) == ["gains", "forgets"]
