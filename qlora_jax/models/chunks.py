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

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from qlora_jax.models.stack import Remat
from qlora_jax.nn.parallel import AXIS, devices_of_context

CHUNK = 8192  # the most tokens of a device in one chunk
_TILE = 128  # the number of tokens in a padded chunk is a multiple of this
_LEAST_TILE = 16  # and in a chunk that needs no padding, of this: the rows of the matrix units

Keys = Sequence[Array | None]


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


def over_chunks(function: Callable[[Array, Keys], Array], x: Array, keys: Keys, count: int) -> Array:
    """Return function(x, keys), computed in `count` chunks of equal length.

    Args:
        function: acts on each token independently; it takes `[n, features]` or `[b, t, features]`, and random keys. Arrays
            that it closes over must be in device memory.
        x: `[b, t, features]`, its rows split over the devices of the context.
        keys: random keys; each chunk gets different ones that are derived from them.
        count: number of chunks.

    Returns:
        The function's result, in the shape of x.
    """
    if count == 1:
        return function(x, keys)
    devices, features = devices_of_context(), x.shape[-1]
    tokens = x.reshape(devices, -1, features)  # by device, so that splitting into chunks needs no communication
    own = tokens.shape[1]
    length = own // count if own % (count * _LEAST_TILE) == 0 else -(-own // (count * _TILE)) * _TILE
    padded = jnp.pad(tokens, ((0, 0), (0, count * length - own), (0, 0)))
    chunks = _spread(padded.reshape(devices, count, length, features), 0).swapaxes(0, 1)

    def run(part: tuple[Array, Keys]) -> Array:
        return function(_spread(part[0], 0), part[1])

    own_keys = [None if key is None else jax.random.split(key, count) for key in keys]
    done = jax.lax.map(jax.checkpoint(run, prevent_cse=False), (chunks, own_keys))
    return _spread(done, 1).swapaxes(0, 1).reshape(devices, -1, features)[:, :own].reshape(x.shape)


def _spread(x: Array, axis: int) -> Array:
    """Constrain an axis of x to be split over the devices of the context."""
    if devices_of_context() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, AXIS))
