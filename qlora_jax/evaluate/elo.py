"""Elo ratings of models from verdicts on pairs of answers (Elo 1978; Dettmers et al. 2023, arXiv 2305.14314, Table 1).

All models start with 1000. After a comparison of a and b, with s = 1 if a is better, ½ for a tie and 0 otherwise,

    e = 1 / (1 + 10^((R_b - R_a) / 400))        R_a += K (s - e)        R_b -= K (s - e)

The ratings depend on the order of the comparisons, the last ones most. The rating of a model is therefore its mean over many
runs, each with a random order. A run takes only some of the comparisons: the ratings move away from 1000 with each one, and
with K = 32 they have settled after some hundreds per model. The QLoRA paper's table is that of about 500 comparisons a run.

A permutation of all comparisons is cut into as many runs as fit into it, so that these runs have no comparison in common.
Each run is a uniform draw without replacement, and the mean over runs varies no more than with independent draws.
All runs are simulated side by side: a step is one comparison of every run.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from qlora_jax.errors import DataError, OptionError, list_names
from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.judgements import Judgements

__all__ = ["COMPARISONS", "Elo", "check_connected", "check_elo", "elo_ratings"]

COMPARISONS = 500
_AT_A_TIME = 20_000_000  # comparisons of one block of runs
_RUNS_OF_OTHER_LENGTHS = 2_000


@dataclass(frozen=True)
class Elo:
    """Elo ratings.

    Attributes:
        ratings: the mean of each model's rating over the runs, and the bounds between which 95 % of the runs are.
        errors: half the width of the 95 % confidence interval of each mean, from the spread of the runs.
        comparisons: number of comparisons of a run.
        by_length: the mean ratings after other numbers of comparisons, by number and model.
    """

    ratings: dict[str, Interval]
    errors: dict[str, float]
    comparisons: int
    by_length: dict[int, dict[str, float]]


def check_connected(judgements: Judgements) -> None:
    """Raise DataError if some models were never compared with the others, not even through further models."""
    valid = judgements.valid()
    reached, before = {int(valid.first[0])} if len(valid) else set(), -1
    while len(reached) != before:
        before = len(reached)
        inside = np.isin(valid.first, list(reached)) | np.isin(valid.second, list(reached))
        reached |= set(valid.first[inside].tolist()) | set(valid.second[inside].tolist())
    apart = [name for index, name in enumerate(judgements.models) if index not in reached]
    if not reached:
        models = list_names(judgements.models)
        instead = "rows without one only" if len(judgements) else "no rows"
        raise DataError(f"{judgements.source}: expected verdicts on common questions of {models}, found {instead}")
    if apart:
        joined = list_names([judgements.models[index] for index in sorted(reached)])
        raise DataError(
            f"{judgements.source}: expected verdicts that connect all models, found no common questions of {joined} with "
            f"{list_names(apart)}; name the models of one group with --models"
        )


def elo_ratings(
    judgements: Judgements,
    *,
    orders: int = 10_000,
    comparisons: int | None = None,
    k_factor: float = 32.0,
    start: float = 1000.0,
    seed: int = 0,
) -> Elo:
    """Return the Elo ratings of all models.

    Args:
        judgements: verdicts; rows without a verdict are ignored.
        orders: number of runs.
        comparisons: number of comparisons of a run; 0: all; None: 500, or all if there are fewer.
        k_factor: the most points that a comparison moves.
        start: the rating before the first comparison, which is also the mean of all models' ratings.
        seed: seed of the orders.

    Raises:
        OptionError: a number is out of range, or there are fewer comparisons than asked for.
        DataError: some models were never compared with the others.
    """
    check_elo(orders=orders, k_factor=k_factor, start=start)
    check_connected(judgements)
    valid = judgements.valid()
    total = len(valid)
    length = _length(comparisons, total, judgements.source)
    games = _Games(valid.first, valid.second, valid.points(), len(valid.models), k_factor, start)
    shorter = {max(1, length // 4), max(1, length // 2)}
    main = _simulate(games, orders=orders, length=length, at=shorter | {length}, seed=seed)
    most = min(total, _AT_A_TIME // min(orders, _RUNS_OF_OTHER_LENGTHS))
    longer = {number for number in (2 * length, 4 * length, total) if length < number <= most}
    runs = {number: main[number] for number in shorter | {length}}
    if longer:
        number_of_runs = min(orders, _RUNS_OF_OTHER_LENGTHS)
        runs |= _simulate(games, orders=number_of_runs, length=max(longer), at=longer, seed=seed + 1)
    low, high = np.percentile(main[length], [2.5, 97.5], axis=0)
    means = main[length].mean(0)
    spread = main[length].std(0, ddof=1) if orders > 1 else np.full(len(means), np.nan)
    return Elo(
        {name: Interval(*map(float, row)) for name, *row in zip(valid.models, means, low, high, strict=True)},
        dict(zip(valid.models, (1.96 * spread / np.sqrt(orders)).tolist(), strict=True)),
        length,
        {number: dict(zip(valid.models, runs[number].mean(0).tolist(), strict=True)) for number in sorted(runs)},
    )


def check_elo(*, orders: int, k_factor: float, start: float) -> None:
    """Raise OptionError for the first of these numbers that is out of range."""
    if orders < 1:
        raise OptionError(f"orders: expected a positive number, found {orders}")
    if not (math.isfinite(k_factor) and k_factor > 0):
        raise OptionError(f"k_factor: expected a positive number, found {k_factor}")
    if not math.isfinite(start):
        raise OptionError(f"start: expected a finite number, found {start}")


def _length(comparisons: int | None, total: int, source: str) -> int:
    if comparisons is None:
        return min(COMPARISONS, total)
    if not 0 <= comparisons <= total:
        raise OptionError(
            f"comparisons: expected at most the {total:,} verdicts of {source}, and 0 for all of them, found {comparisons:,}"
        )
    return comparisons or total


@dataclass(frozen=True)
class _Games:
    """What every run plays: indices of the models and points of the first `[n]`, and the rule of the ratings."""

    first: np.ndarray
    second: np.ndarray
    points: np.ndarray
    models: int
    k_factor: float
    start: float


def _simulate(games: _Games, *, orders: int, length: int, at: Collection[int], seed: int) -> dict[int, np.ndarray]:
    """Return the ratings `[orders, models]` of all runs after each number of comparisons in `at`."""
    models = games.models
    draws = np.random.default_rng(seed)
    block = max(1, _AT_A_TIME // length)
    found: dict[int, list[np.ndarray]] = {number: [] for number in at}
    for begin in range(0, orders, block):
        runs = min(block, orders - begin)
        drawn = _draw(draws, len(games.first), length, runs)
        ratings = np.full(runs * models, games.start)  # all models of a run side by side
        offset = np.arange(runs) * models
        for step, game in enumerate(drawn, start=1):
            a, b = offset + games.first[game], offset + games.second[game]
            rating_a, rating_b = ratings[a], ratings[b]
            moved = games.k_factor * (games.points[game] - expected_points(rating_a, rating_b))
            ratings[a], ratings[b] = rating_a + moved, rating_b - moved
            if step in found:
                found[step].append(ratings.reshape(runs, models).copy())
    return {number: np.concatenate(blocks) for number, blocks in found.items()}


def expected_points(rating_a: np.ndarray, rating_b: np.ndarray) -> np.ndarray:
    """Return the points that Elo's model expects of a against b, between 0 and 1."""
    return 1 / (1 + np.exp((rating_b - rating_a) * (np.log(10) / 400)))


def _draw(draws: np.random.Generator, total: int, length: int, runs: int) -> np.ndarray:
    """Return the comparisons of each step and run, int64 `[length, runs]`; no run has a comparison twice."""
    together = total // length  # runs of one permutation
    shuffled = np.empty((-(-runs // together), together * length), np.int64)
    for row in shuffled:
        row[:] = draws.permutation(total)[: together * length]
    return np.ascontiguousarray(shuffled.reshape(-1, length)[:runs].T)
