"""The size of the difference that a comparison could have seen, so that "equal" is a finding and not a shortage of seeds.

Two variants are compared by their differences d for each of n seeds, with Student's t at the level 5 %. If the true
difference is δ, the test statistic has the noncentral t distribution with n - 1 degrees of freedom and noncentrality
δ √n / s, where s is the spread of d. The test then finds a difference with the probability (power)

    1 - β = P(|T| > t)        t: the 97.5 % point of the central distribution

The smallest difference that is found with a power of 80 % is the answer to "what could this run have seen?". It follows from
s and n alone, not from the difference that was found. A finding is one of three:

    better, worse        the interval of the mean difference does not contain 0
    equal within X       it contains 0, and all of it is within ±X, the margin that the user sets
    not settled          it contains 0 and goes beyond the margin: the seeds are too few to tell
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats
from scipy.special import ndtr

from scripts.studies.comparison.intervals import SHARE, Interval, difference, interval

POWER = 0.8
_MOST_SEEDS = 1000
_QUANTILES = 4000

__all__ = ["POWER", "Finding", "detectable", "finding", "power_of", "seeds_needed"]


def power_of(size: float, spread: float, seeds: int) -> float:
    """Return the probability that the test finds a true difference of this size.

    Args:
        size: the difference, above 0.
        spread: the standard deviation of the differences of a seed, above 0.
        seeds: number of seeds, at least 2.
    """
    # scipy's noncentral t returns NaN for some values. Given the sample's spread, which has a chi-squared distribution, the
    # mean is normal: the power is the mean over the quantiles of that distribution.
    limits, shift = _limits(seeds), size * math.sqrt(seeds) / spread
    return float((ndtr(shift - limits) + ndtr(-shift - limits)).mean())


@cache
def _limits(seeds: int) -> np.ndarray:
    """Return how large the standardised mean must be, for quantiles of the spread of a sample."""
    quantiles = stats.chi2.ppf((np.arange(_QUANTILES) + 0.5) / _QUANTILES, seeds - 1)
    return stats.t.ppf((1 + SHARE) / 2, seeds - 1) * np.sqrt(quantiles / (seeds - 1))


def detectable(spread: float, seeds: int, power: float = POWER) -> float:
    """Return the smallest true difference that the test finds with this probability; infinite for a single seed."""
    if seeds < 2:
        return math.inf
    if spread == 0:
        return 0.0
    unit = spread / math.sqrt(seeds)  # beyond 100 of which the power is 1, also with 2 seeds
    root: Any = optimize.brentq(lambda size: power_of(size, spread, seeds) - power, 1e-6 * unit, 100 * unit)
    return float(root)


def seeds_needed(spread: float, size: float, power: float = POWER) -> int | None:
    """Return the number of seeds with which the test finds a difference of this size; None: more than 1000."""
    low, high = 2, _MOST_SEEDS
    if size <= 0 or detectable(spread, high, power) > size:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(spread, middle, power) <= size else (middle + 1, high)
    return low


@dataclass(frozen=True)
class Finding:
    """What a comparison of a variant with the baseline says, and could have said.

    Attributes:
        change: the mean difference from the baseline, with its interval.
        baseline: the baseline's mean.
        detectable: the smallest difference that would have been found with a power of 80 %.
        margin: the difference that counts as none.
        needed: the seeds with which a difference as large as the margin would be found; None: more than 1000.
        said: "better", "worse", "equal" or "not settled".
    """

    change: Interval
    baseline: float
    detectable: float
    margin: float
    needed: int | None
    said: Literal["better", "worse", "equal", "not settled"]

    def text(self) -> str:
        """Return the finding in words."""
        share = 100 * self.margin / abs(self.baseline) if self.baseline else math.nan
        if self.said == "equal":
            return f"equal within {share:.3g} %"
        if self.said == "not settled":
            most = abs(self.change.mean) + (self.change.half or math.inf)
            limit = "" if math.isinf(most) else f": a difference up to {100 * most / abs(self.baseline):.2g} % is possible"
            return f"not settled{limit}"
        return self.said


def finding(
    found: Mapping[int, float], baseline: Mapping[int, float], *, margin: float, lower_is_better: bool
) -> Finding | None:
    """Return what the seeds of a variant and of the baseline say; None if they have no seed in common.

    Args:
        found, baseline: the metric by seed.
        margin: the share of the baseline's mean that counts as no difference.
        lower_is_better: whether the metric is.
    """
    change = difference(found, baseline)
    if change is None:
        return None
    mean = interval(list(baseline.values())).mean
    size = margin * abs(mean)
    if change.half is None:
        return Finding(change, mean, math.inf, size, None, "not settled")
    error = change.half / float(stats.t.ppf((1 + SHARE) / 2, change.count - 1))
    spread = error * math.sqrt(change.count)
    needed = seeds_needed(spread, size)
    if abs(change.mean) > change.half:
        said = "better" if (change.mean < 0) == lower_is_better else "worse"
    else:
        said = "equal" if abs(change.mean) + change.half <= size else "not settled"
    return Finding(change, mean, detectable(spread, change.count), size, needed, said)
