"""Sampling of the next token from logits: temperature, then top-k, then top-p, then a random draw.

    temperature  logits / temperature; 0 is greedy: the token with the highest logit, and top-k and top-p have no effect
    top-k        excludes tokens whose logit is below the k-th highest; with ties more than k tokens remain
    top-p        excludes the least likely of the remaining tokens (Holtzman et al. 2020): in ascending order, a token is
                 excluded while the sum of probabilities up to and including it is at most 1 - p. The most likely token is
                 never excluded; of equal logits, the one with the lower token id is excluded first

The order of these steps and the treatment of ties are those of transformers' logits warpers, so settings can be reused.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 chooses the most likely token; 1 draws from the model's own distribution.
        top_k: draw only from the k most likely tokens; None: no limit.
        top_p: draw only from the most likely tokens that together have this probability; None: no limit.

    Raises:
        OptionError: temperature < 0, top_k < 1 or top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature: expected a number of at least 0, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k: expected at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p: expected 0 < top_p <= 1, found {self.top_p}")
        if problems:
            raise OptionError(f"sampling: {'; '.join(problems)}")


def sample(logits: Array, key: Array, sampling: Sampling) -> Array:
    """Return the next token of each row, int32 `[b]`, for logits `[b, v]`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, warp(logits, sampling)).astype(jnp.int32)


def warp(logits: Array, sampling: Sampling) -> Array:
    """Return the float32 logits `[b, v]` to draw from, -inf for excluded tokens; the temperature must be above 0."""
    scores = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        # Not by slicing the last column: XLA replaces a slice of top_k by a complete sort, 70 times slower on a CPU.
        lowest = jax.lax.top_k(scores, sampling.top_k)[0].min(axis=-1, keepdims=True)
        scores = jnp.where(scores < lowest, -jnp.inf, scores)
    if sampling.top_p is not None and sampling.top_p < 1:
        scores = jnp.where(outside_top_p(scores, sampling.top_p), -jnp.inf, scores)
    return scores


def outside_top_p(scores: Array, top_p: float | Array) -> Array:
    """Return the mask of excluded tokens `[b, v]`, found by value, because a scatter from the sorted order is slow on TPUs.

    Args:
        scores: logits `[b, v]`, -inf for tokens that are excluded already.
        top_p: the probability, a number or `[b, 1]`.
    """
    ascending = jnp.sort(scores, axis=-1)
    sums = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    dropped = jnp.sum(sums <= 1 - top_p, axis=-1, keepdims=True)
    dropped = jnp.minimum(dropped, scores.shape[-1] - 1)
    border = jnp.take_along_axis(ascending, dropped, axis=-1)  # the lowest logit that is not excluded
    below, equal = scores < border, scores == border
    equal_dropped = dropped - jnp.sum(below, axis=-1, keepdims=True)
    return below | (equal & (jnp.cumsum(equal, axis=-1) <= equal_dropped))
