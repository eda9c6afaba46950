"""Mixing several sets of examples by weight; the mixture has as many examples as the sets together.

    N is the total number of examples; set i contributes n_i = N · weight_i / Σ weights, rounded so that Σ n_i = N
    - if a set has fewer than n_i examples, each is repeated ⌊n_i / size⌋ or ⌈n_i / size⌉ times
    - if a set has more, n_i different ones are chosen
    - the k-th of the n_i examples is at (k + ½) / n_i of the mixture, so that every part of it has the same shares

The seed determines the choice and the order of the examples. Examples must be held out before mixing; otherwise a repeated
example could be in both parts.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from qlora_jax.errors import DataError, OptionError

T = TypeVar("T")


def mix(sets: Sequence[Sequence[T]], weights: Sequence[float], seed: int = 0) -> list[T]:
    """Return the mixture of several sets of examples.

    Args:
        sets: the sets of examples.
        weights: the weight of each set, above 0.
        seed: seed of the choice and the order.

    Raises:
        OptionError: the weights are invalid.
        DataError: a set is empty.
    """
    check_weights(weights, len(sets))
    for index, examples in enumerate(sets):
        if not examples:
            raise DataError(f"set {index} of a mixture: expected at least one example, found none")
    counts = _apportion(sum(len(examples) for examples in sets), weights)
    if 0 in counts:
        raise OptionError(f"weights: expected each set to have an example in the mixture, found {counts}")
    drawn: list[tuple[float, int, T]] = []
    for index, (examples, count) in enumerate(zip(sets, counts, strict=True)):
        random = np.random.default_rng([seed, index])
        rounds = -(-count // len(examples))
        order = np.concatenate([random.permutation(len(examples)) for _ in range(rounds)])[:count]
        drawn.extend(((k + 0.5) / count, index, examples[choice]) for k, choice in enumerate(order.tolist()))
    return [example for _, _, example in sorted(drawn, key=lambda item: item[:2])]


def check_weights(weights: Sequence[float], sources: int) -> None:
    """Raise OptionError unless there is one weight above 0 for each of at least two sources."""
    if sources < 2:
        raise OptionError(f"weights: expected two sources of data or more, found {sources}")
    if len(weights) != sources:
        raise OptionError(f"weights: expected one for each of {sources} sources of data, found {len(weights)}")
    if not all(0 < weight < math.inf for weight in weights):
        raise OptionError(f"weights: expected numbers above 0, found {', '.join(f'{weight:g}' for weight in weights)}")


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Return integers in the ratio of the weights whose sum is the total; the largest remainders are rounded up."""
    exact = np.asarray(weights, np.float64) * total / math.fsum(weights)
    counts = np.floor(exact).astype(int)
    short = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return counts.tolist()
