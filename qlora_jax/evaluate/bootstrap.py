"""Confidence intervals by resampling questions (Efron's percentile bootstrap).

Judgements of one question depend on each other, because they are of the same answers. Questions are therefore drawn, with
replacement, together with all their judgements. A resample is the number of times that each question was drawn; a statistic
of sums over questions is calculated from the products of these numbers with the sums of each question.
"""

from collections.abc import Callable

import numpy as np

__all__ = ["over_questions"]

_AT_A_TIME = 4_000_000  # numbers of one block of resamples


def over_questions(
    statistic: Callable[[np.ndarray], np.ndarray], questions: int, *, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds between which 95 % of the resamples of a statistic are.

    Args:
        statistic: takes the number of times that each question was drawn, float64 `[resamples, questions]`, and returns the
            statistic of each resample, `[resamples, …]`; NaN where it is undefined. Such resamples are left out.
        questions: number of questions; with fewer than two the bounds are NaN.
        resamples: number of resamples.
        seed: seed of the draws.
    """
    draws = np.random.default_rng(seed)
    block = max(1, _AT_A_TIME // max(questions, 1))
    found = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        found.append(statistic(draws.multinomial(questions, np.full(questions, 1 / questions), size).astype(np.float64)))
    values = np.concatenate(found)
    edges = np.full((2, *values.shape[1:]), np.nan)
    defined = ~np.isnan(values).all(0)
    if questions > 1:
        edges[:, defined] = np.nanpercentile(values[:, defined], [2.5, 97.5], axis=0)
    return edges[0], edges[1]
