"""Intervals against scipy's own, and by how often they hold what is true."""

import numpy as np
import pytest
from scipy import stats

from qlora_jax.evaluate import mean_interval, paired_difference, share_interval


def test_the_mean_has_students_interval() -> None:
    x = np.random.default_rng(0).normal(3, 2, 12)
    found = mean_interval(x)
    expected = stats.t.interval(0.95, 11, loc=x.mean(), scale=stats.sem(x))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.value == pytest.approx(x.mean())
    assert (mean_interval(x, 0.5).low, mean_interval(x, 0.5).high) == pytest.approx(
        stats.t.interval(0.5, 11, loc=x.mean(), scale=stats.sem(x))
    )


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 10), (260, 1000)])
def test_a_share_has_wilsons_interval(right: int, count: int) -> None:
    found = share_interval(np.arange(count) < right)
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((right / count, expected.low, expected.high))


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    draws = np.random.default_rng(1).normal(5, 1, (2000, 8))
    held = np.mean([found.low < 5 < found.high for found in map(mean_interval, draws)])
    assert held == pytest.approx(0.95, abs=0.015)


def test_pairs_tell_apart_what_means_do_not() -> None:
    generator = np.random.default_rng(2)
    texts = generator.normal(3, 1, 40)
    a, b = texts + generator.normal(0.1, 0.05, 40), texts + generator.normal(0, 0.05, 40)
    assert mean_interval(a).low < mean_interval(b).high
    found = paired_difference(a, b)
    assert found.low > 0.05
    assert found.text(2, sign=True).startswith("+0.1")


def test_unusable_values() -> None:
    for values in ([1.0], [1.0, np.nan], np.zeros((2, 2))):
        with pytest.raises(ValueError, match="expected at least two finite values"):
            mean_interval(values)
    with pytest.raises(ValueError, match="expected at least one answer, found none"):
        share_interval([])
    with pytest.raises(ValueError, match=r"expected as many of both, found \(2,\) and \(3,\)"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
