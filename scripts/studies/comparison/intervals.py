"""Means over seeds with 95 % intervals, and the comparison of two variants.

The intervals are those of Student's t with n - 1 degrees of freedom. Two variants are compared by their differences for each
seed, because a seed determines the same order of the data for both:

    better or worse    the interval of the mean difference does not contain 0
    no difference      it contains 0; the interval itself shows how large an undetected difference can be
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

SHARE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and half the width of its interval, which is None for a single value."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.half is None else f"{self.mean:.4g} ± {self.half:.2g}"

    def contains(self, value: float) -> bool | None:
        """Return whether the interval contains a value; None for a single run, which has no interval."""
        return None if self.half is None else abs(self.mean - value) <= self.half


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and the interval of one or more values."""
    array = np.asarray(values, np.float64)
    if array.size == 1:
        return Interval(float(array[0]), None, 1)
    error = array.std(ddof=1) / math.sqrt(array.size)
    return Interval(float(array.mean()), float(stats.t.ppf((1 + SHARE) / 2, array.size - 1) * error), int(array.size))


def difference(found: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """Return the mean difference from the baseline over the seeds that both have, or None if there are none."""
    seeds = sorted(found.keys() & baseline.keys())
    return interval([found[seed] - baseline[seed] for seed in seeds]) if seeds else None


def verdict(change: Interval | None, *, lower_is_better: bool) -> str:
    """Return the result of a comparison in words."""
    if change is None:
        return "no seed in common"
    inside = change.contains(0.0)
    if inside is None:
        return "one seed: no verdict"
    if inside:
        return "equal within the interval"
    return "better" if (change.mean < 0) == lower_is_better else "worse"
