"""The feed-forward network applied to one chunk of the tokens after another, which limits the memory of long sequences.

    forward     for each chunk:  y = f(x)                          no residual is saved, because x is available anyway
    backward    for each chunk:  recompute f(x), then its gradient      inner activations of one chunk only are in memory

The activations inside a feed-forward network are several times as wide as its input, and the backward pass holds several of
them at once. From some sequence length on, these activations determine how much memory a step needs, and not the saved
residuals of the layers.

The loop is inside a layer that is recomputed as a whole in the backward pass. This recomputes x but not y, which the
backward pass does not read. So f runs forward twice in total, as without chunks, and no product is added. This holds if f
contains everything from the norm before the network to the norm after it and the sum with x.

Each chunk dequantises the matrices again, so chunks are large.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.models.stack import Remat
from qlora_jax.nn.context import Contexts
from qlora_jax.nn.mesh import row_shards
from qlora_jax.nn.parallel import spread_rows

CHUNK = 8192  # the most tokens of a device in one chunk
_TILE = 128  # the number of tokens in a padded chunk is a multiple of this
_LEAST_TILE = 16  # and in a chunk that needs no padding, of this: the rows of the matrix units


def chunk_count(tokens: int, remat: Remat) -> int:
    """Return the number of chunks for so many tokens of each device; 1 if `remat` saves the inner activations anyway.

    Chunks of which the last would be padded need a copy of all tokens, as large as the residual stream. So up to twice as
    many chunks are made if they then divide the tokens.
    """
    if remat not in ("full", "offload"):
        return 1
    least = -(-tokens // CHUNK)
    even = (count for count in range(least, 2 * least) if tokens % (count * _LEAST_TILE) == 0)
    return next(even, least)


def over_chunks(function: Callable[[Array, Contexts], Array], x: Array, contexts: Contexts, count: int) -> Array:
    """Return function(x, contexts), computed in `count` chunks of equal length.

    Args:
        function: acts on each token independently; it takes `[n, features]` or `[b, t, features]`, and contexts. Arrays
            that it closes over must be in device memory.
        x: `[b, t, features]`, its rows split over the devices of the context.
        contexts: of the linear layers; each chunk gets different random keys that are derived from theirs. With adapter ids
            a chunk has a part of every row, so that the ids remain one for each row.
        count: number of chunks.

    Returns:
        The function's result, in the shape of x.
    """
    if count == 1:
        return function(x, contexts)
    by_device = all(context.adapter_ids is None for context in contexts)
    groups, features = row_shards() if by_device else x.shape[0], x.shape[-1]
    tokens = x.reshape(groups, -1, features)  # by device, so that splitting into chunks needs no communication
    own = tokens.shape[1]
    length = own // count if own % (count * _LEAST_TILE) == 0 else -(-own // (count * _TILE)) * _TILE
    padded = jnp.pad(tokens, ((0, 0), (0, count * length - own), (0, 0)))
    chunks = spread_rows(padded.reshape(groups, count, length, features), 0).swapaxes(0, 1)

    def run(part: tuple[Array, Sequence[Array | None]]) -> Array:
        own_contexts = [replace(context, key=key) for context, key in zip(contexts, part[1], strict=True)]
        return function(spread_rows(part[0], 0), own_contexts)

    keys = [None if context.key is None else jax.random.split(context.key, count) for context in contexts]
    done = jax.lax.map(jax.checkpoint(run, prevent_cse=False), (chunks, keys))
    return spread_rows(done, 1).swapaxes(0, 1).reshape(groups, -1, features)[:, :own].reshape(x.shape)
