"""Metrics with 95 % confidence intervals, which account for the random choice of the texts or questions.

mean         m ± t s / √n                 Student's t with n - 1 degrees of freedom
share        Wilson's score interval      e.g. of correct answers; never outside [0, 1]
difference   the mean of a_i - b_i, both measured on the same texts. The difficulty of a text affects both and cancels, so
             this interval is much narrower than those of the two means
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from qlora_jax.errors import DataError

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A metric and the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 4, sign: bool = False) -> str:
        """Return text like `1.2345 [1.2, 1.3]`; with `sign`, positive numbers have a plus sign."""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Return the mean of values `[n]` with its interval.

    Raises:
        DataError: fewer than two values, or values that are not finite.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or x.size < 2 or not np.isfinite(x).all():
        raise DataError(f"an interval: expected at least two finite values, found shape {x.shape} with {x.size} values")
    mean, half = float(x.mean()), float(stdtrit(x.size - 1, (1 + level) / 2) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean, mean - half, mean + half)


def share_interval(right: Sequence[bool] | np.ndarray, level: float = LEVEL) -> Interval:
    """Return the share of true values with its interval.

    Raises:
        DataError: no values.
    """
    n = len(right)
    if n == 0:
        raise DataError("an interval: expected at least one answer, found none")
    share, z = float(np.mean(right)), float(ndtri((1 + level) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Interval:
    """Return the mean of a - b over pairs with its interval.

    Raises:
        DataError: different numbers of values, fewer than two pairs, or values that are not finite.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        raise DataError(f"paired values: expected as many of both, found {x.shape} and {y.shape}")
    return mean_interval(x - y, level)
