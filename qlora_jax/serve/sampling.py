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
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.errors import OptionError

LEAST_TEMPERATURE = 1e-30  # a smaller one gives the same tokens, and would make several logits infinite
_LEAST = 0x007FFFFF  # -inf in the order of floating-point numbers as unsigned integers


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
    scores = logits.astype(jnp.float32) / max(sampling.temperature, LEAST_TEMPERATURE)
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        scores = jnp.where(scores < kth_highest(scores, sampling.top_k), -jnp.inf, scores)
    if sampling.top_p is not None and sampling.top_p < 1:
        scores = jnp.where(outside_top_p(scores, sampling.top_p), -jnp.inf, scores)
    return scores


def kth_highest(scores: Array, k: int | Array) -> Array:
    """Return the k-th highest number of each row, `[b, 1]`, for scores float32 `[b, v]` and k, a number or `[b, 1]`."""

    def enough(border: Array) -> Array:
        return jnp.sum(scores >= border, axis=-1, keepdims=True) >= k

    return _largest(enough, (scores.shape[0], 1))


def outside_top_p(scores: Array, top_p: float | Array) -> Array:
    """Return the mask of excluded tokens `[b, v]`.

    Args:
        scores: float32 logits `[b, v]`, -inf for tokens that are excluded already.
        top_p: the probability, a number or `[b, 1]`.
    """
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    least = (1 - top_p) * jnp.sum(weights, axis=-1, keepdims=True)

    def below(border: Array) -> Array:
        return jnp.sum(jnp.where(scores < border, weights, 0), axis=-1, keepdims=True)

    # Together, the tokens below the border have at most 1 - p, and with those at the border they have more. The most likely
    # token is never below it.
    border = jnp.minimum(_largest(lambda border: below(border) <= least, highest.shape), highest)
    equal = scores == border
    weight = jnp.exp(border - highest)
    dropped = jnp.floor((least - below(border)) / weight).astype(jnp.int32)
    dropped = jnp.clip(dropped, 0, jnp.sum(equal, axis=-1, keepdims=True) - 1)
    return (scores < border) | (equal & (jnp.cumsum(equal, axis=-1) <= dropped))


def _largest(holds: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """Return the largest float32 for which a property holds that all smaller numbers have, and -inf has in any case.

    It is found bit by bit, from the highest one on, in the order of floating-point numbers as unsigned integers: 32 passes
    over the logits, where sorting takes 20 times as long on a CPU.

    Args:
        holds: takes numbers of `shape` and returns a mask of it.
        shape: of the result.
    """

    def number(ordered: Array) -> Array:
        bits = jnp.where(ordered >> 31 == 1, ordered ^ jnp.uint32(1 << 31), ~ordered)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def with_bit(index: Array, found: Array) -> Array:
        tried = found | jnp.uint32(1 << 31) >> index.astype(jnp.uint32)
        value = number(tried)
        # In this order, NaN with the sign bit is below -inf, and NaN without it is above inf.
        return jnp.where((tried <= _LEAST) | (holds(value) & ~jnp.isnan(value)), tried, found)

    return number(jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(shape, jnp.uint32)))
