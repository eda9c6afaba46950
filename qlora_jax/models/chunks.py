"""The feed-forward of many tokens, a chunk of them after another.

    forward     for each chunk:  y = f(x)                  nothing is kept: x is there anyway
    backward    for each chunk:  f(x) once more, and back  of one chunk alone do the inner activations live

What a feed-forward makes between its input and its output is several times as wide as these, and the backward pass holds
several of it at once: from some length on that, and not what the layers keep, decides how much memory a step takes.

The loop stands within a layer that is recomputed as a whole. What the layer recomputes for the backward pass is x, and not
y, which nobody reads: so f runs forward twice in all, as it does without chunks, and no product is added. That holds for
everything from the norm before to the norm behind and the sum with x, if all of it is in f.

Each chunk dequantises the matrices anew, which is why chunks are large.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from qlora_jax.models.stack import Remat
from qlora_jax.nn.parallel import AXIS, devices_of_context

CHUNK = 8192  # tokens of each device, up to which a feed-forward runs at once
_TILE = 128  # of tokens: the length of a chunk is a multiple of it

Keys = Sequence[Array | None]


def chunk_count(tokens: int, remat: Remat) -> int:
    """How many chunks the feed-forward takes so many tokens of each device in; one where the backward pass keeps all of what
    is made inside anyway."""
    return -(-tokens // CHUNK) if remat in ("full", "offload") else 1


def over_chunks(function: Callable[[Array, Keys], Array], x: Array, keys: Keys, count: int) -> Array:
    """function(x, keys) for a function of each token by itself, in so many chunks of equal length.

    Args:
        function: of `[n, features]` or `[b, t, features]`, and random keys; what it closes over lies on the device.
        x: `[b, t, features]`, its rows spread over the devices of the context.
        keys: random keys, of which each chunk has its own.

    Returns:
        What the function returns, in the shape of x.
    """
    if count == 1:
        return function(x, keys)
    devices, features = devices_of_context(), x.shape[-1]
    tokens = x.reshape(devices, -1, features)  # each device's own: cutting them moves nothing from one to another
    own = tokens.shape[1]
    length = -(-own // (count * _TILE)) * _TILE
    padded = jnp.pad(tokens, ((0, 0), (0, count * length - own), (0, 0)))
    chunks = _spread(padded.reshape(devices, count, length, features), 0).swapaxes(0, 1)

    def run(part: tuple[Array, Keys]) -> Array:
        return function(_spread(part[0], 0), part[1])

    own_keys = [None if key is None else jax.random.split(key, count) for key in keys]
    done = jax.lax.map(jax.checkpoint(run, prevent_cse=False), (chunks, own_keys))
    return _spread(done, 1).swapaxes(0, 1).reshape(devices, -1, features)[:, :own].reshape(x.shape)


def _spread(x: Array, axis: int) -> Array:
    """x with an axis over the devices of the context."""
    if devices_of_context() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, AXIS))
