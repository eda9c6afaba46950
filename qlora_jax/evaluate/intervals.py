"""Figures with their 95 % intervals, as far as the texts or questions that were drawn go.

mean         m ± t s / √n                 Student's t with n - 1 degrees of freedom
share        Wilson's score interval      of right answers, say; never outside of [0, 1]
difference   the mean of a_i - b_i, both measured on the same texts: what makes one text harder than another is in
             in both and cancels, so that this interval is far narrower than those of the two means
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 4, sign: bool = False) -> str:
        """`1.234 [1.2, 1.3]`, with a sign if asked for."""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """The mean of `[n]` values.

    Raises:
        ValueError: fewer than two values, or some that are not finite.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or x.size < 2 or not np.isfinite(x).all():
        raise ValueError(f"an interval: expected at least two finite values, found shape {x.shape} with {x.size} values")
    mean, half = float(x.mean()), float(stdtrit(x.size - 1, (1 + level) / 2) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean, mean - half, mean + half)


def share_interval(right: Sequence[bool] | np.ndarray, level: float = LEVEL) -> Interval:
    """The share of true values.

    Raises:
        ValueError: no values.
    """
    n = len(right)
    if n == 0:
        raise ValueError("an interval: expected at least one answer, found none")
    share, z = float(np.mean(right)), float(ndtri((1 + level) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Interval:
    """The mean of a - b over pairs.

    Raises:
        ValueError: other numbers of values, or what `mean_interval` refuses.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"paired values: expected as many of both, found {x.shape} and {y.shape}")
    return mean_interval(x - y, level)
