"""Ratings of the Bradley-Terry model, which do not depend on the order of the comparisons (Bradley and Terry 1952).

    P(a is better than b) = 1 / (1 + e^(θ_b - θ_a))        rating = 1000 + 400 / ln 10 · (θ - mean θ)

θ maximises the likelihood of all comparisons; a tie counts as half a win of each. Elo's expected points have the same form,
and the ratings the same scale. The maximum is finite if and only if no group of models has won all its comparisons
with the others (Ford 1957): every model must be reachable from every other through wins and ties. Newton's method finds it.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from qlora_jax.errors import OptionError
from qlora_jax.evaluate.bootstrap import over_questions
from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.judgements import Judgements
from qlora_jax.evaluate.rankings import reachable

__all__ = ["BradleyTerry", "bradley_terry", "fit_bradley_terry"]

_SCALE = 400 / np.log(10)
_STEPS = 200
_LARGEST_STEP = 1.0  # of θ; far from the maximum, Newton's step may be far too long


@dataclass(frozen=True)
class BradleyTerry:
    """Bradley-Terry ratings.

    Attributes:
        ratings: the ratings with bounds from resampled questions; None: the likelihood has no maximum.
        undefined: share of the resamples without a maximum, which are left out of the bounds.
    """

    ratings: dict[str, Interval] | None
    undefined: float


def bradley_terry(judgements: Judgements, *, resamples: int = 1_000, start: float = 1000.0, seed: int = 0) -> BradleyTerry:
    """Return the Bradley-Terry ratings of all models.

    Args:
        judgements: verdicts; rows without a verdict are ignored.
        resamples: number of resamples of the questions for the intervals.
        start: the mean of the ratings.
        seed: seed of the resamples.

    Raises:
        OptionError: `resamples` is not positive.
    """
    if resamples < 1:
        raise OptionError(f"resamples: expected at least 1, found {resamples}")
    valid, models = judgements.valid(), len(judgements.models)
    asked, question = np.unique(valid.question, return_inverse=True)
    points = valid.points()
    rows = np.concatenate([question, question])
    pairs = np.concatenate([valid.first * models + valid.second, valid.second * models + valid.first])
    wins = csr_array((np.concatenate([points, 1 - points]), (rows, pairs)), shape=(len(asked), models * models))
    undefined: list[int] = []

    def fitted(drawn: np.ndarray) -> np.ndarray:  # [n, questions] -> [n, models]
        ratings = fit_bradley_terry((wins.T @ drawn.T).T.reshape(-1, models, models))
        undefined.append(int(np.isnan(ratings[:, 0]).sum()))
        return ratings

    ratings = start + fitted(np.ones((1, len(asked))))[0]
    if np.isnan(ratings).any():
        return BradleyTerry(None, 1.0)
    undefined.clear()
    low, high = over_questions(fitted, len(asked), resamples=resamples, seed=seed)
    bounds = zip(judgements.models, ratings, start + low, start + high, strict=True)
    return BradleyTerry({name: Interval(*map(float, row)) for name, *row in bounds}, sum(undefined) / resamples)


def fit_bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Return the ratings `[n, models]`, whose mean is 0, of n tables of wins.

    Args:
        wins: float64 `[n, models, models]`: how often the model of the row was better than that of the column, with half a
            win of each for a tie.

    Returns:
        float64; NaN for a table whose likelihood has no finite maximum.
    """
    models = wins.shape[-1]
    finite = reachable(wins).all((1, 2))
    ratings = np.full(wins.shape[:2], np.nan)
    won = wins[finite]
    games, theta = won + won.swapaxes(1, 2), np.zeros(won.shape[:2])
    for _ in range(_STEPS if len(won) else 0):
        expected = games / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))
        gradient = (won - expected).sum(2)
        weight = expected * expected.swapaxes(1, 2) / np.maximum(games, 1e-300)
        # The sum of θ is free; a matrix of ones in the Hessian keeps it.
        hessian = weight.sum(2)[:, :, None] * np.eye(models) - weight + 1.0
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        longest = np.abs(step).max(1)
        theta += step * np.minimum(1, _LARGEST_STEP / np.maximum(longest, _LARGEST_STEP))[:, None]
        if longest.max() < 1e-12:
            break
    ratings[finite] = _SCALE * (theta - theta.mean(1, keepdims=True))
    return ratings
