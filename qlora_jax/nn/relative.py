"""Relative position bias (Raffel et al. 2020, section 2.1): a learned number for each head and bucket of distances.

    each near distance has its own bucket; farther ones share buckets of logarithmically growing width, and the last bucket
    holds all distances from `max_distance` on
    causal          n buckets for the distance from a query back to a key
    bidirectional   n / 2 buckets for keys before the query and n / 2 for keys after it

The bucket of each distance is computed on the host with the rounding of transformers, because it must not depend on the
compiler whether a logarithm is just below a whole number or equal to it.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int


def relative_position_bias(
    table: Float[Array, "buckets heads"],
    queries: Int[Array, " t"],
    keys: Int[Array, " s"],
    *,
    bidirectional: bool,
    max_distance: int,
) -> Float32[Array, "heads t s"]:
    """Return the bias of the attention scores, float32 `[heads, t, s]`.

    Args:
        table: `[buckets, heads]`, the learned numbers.
        queries: int32 `[t]`, positions of the queries.
        keys: int32 `[s]`, positions of the keys.
        bidirectional: whether keys after the query have buckets of their own.
        max_distance: all distances from here on share a bucket.
    """
    each_side = table.shape[0] // 2 if bidirectional else table.shape[0]
    relative = keys[None, :] - queries[:, None]
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    buckets = jnp.asarray(distance_buckets(each_side, max_distance))[jnp.minimum(distance, max_distance)]
    if bidirectional:
        buckets = buckets + jnp.where(relative > 0, each_side, 0)
    return table.astype(jnp.float32)[buckets].transpose(2, 0, 1)


def distance_buckets(buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance from 0 to max_distance, int32 `[max_distance + 1]`."""
    exact, distance = buckets // 2, np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    share = np.log(ratio) / np.float32(math.log(max_distance / exact))
    far = exact + (share * np.float32(buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(np.int32)
