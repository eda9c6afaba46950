"""The cache of keys and values of past tokens, for decoding."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from qlora_jax.models.config import DecoderConfig
from qlora_jax.nn.attention import QUERIES_AT_ONCE

MaskOf = Callable[[Array | None, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, for decoding.

    Attributes:
        keys, values: `[layers, b, kv_heads, capacity, head_dim]`. Attention multiplies with them in this order; with another
            order, a compiler may copy all of them in every step.
        filled: bool `[b, capacity]`, true for slots that contain a token and not padding.
        length: int32 scalar, the number of slots used so far, equal for all rows (prompts are padded on the left).
    """

    keys: Array
    values: Array
    filled: Array
    length: Array


def empty_cache(config: DecoderConfig, dtype: DTypeLike, batch_size: int, capacity: int) -> KVCache:
    """Return an empty cache for `capacity` tokens per row."""
    shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
    return KVCache(  # two different buffers, because a buffer can be donated only once
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((batch_size, capacity), bool),
        jnp.zeros((), jnp.int32),
    )


def cache_masks(
    config: DecoderConfig, cache: KVCache, positions: Int[Array, "b t"], virtual_tokens: int
) -> tuple[Bool[Array, "b capacity"], MaskOf]:
    """Return (the slots that contain a token after new ones were added, the slots that each new token attends to).

    The second is a function of the index of a layer's kind of attention (None: the only one) and of the numbers of new
    tokens `[n]`; it returns bool `[b, n, capacity]`. So the mask of a long prompt is never stored as a whole.

    Args:
        config: the configuration of the model.
        cache: the cache without the new tokens.
        positions: int32 `[b, t]` of the new tokens; negative for padding.
        virtual_tokens: number of virtual tokens, which occupy the first slots.
    """
    count = positions.shape[1]
    filled = jax.lax.dynamic_update_slice(cache.filled, positions >= 0, (0, cache.length))
    slots = jnp.arange(cache.filled.shape[1])
    # Prompts are padded on the left, so distances between slots equal distances between positions, except for virtual
    # tokens, whose slots are before the padding.
    shifted = slots[None]
    if virtual_tokens:
        padding = cache.length + count - 1 - positions[:, -1:]
        shifted = jnp.where(shifted < virtual_tokens, shifted + padding, shifted)
    shifted = shifted[:, None, :]

    def masks_of(tokens: Array) -> Array:
        own = cache.length + tokens[:, None]
        mask = filled[:, None, :] & (slots <= own)[None]
        windows = [kind.window for kind in config.kinds]
        return jnp.stack([mask if window is None else mask & (shifted > own[None] - window) for window in windows])

    # Of few tokens the mask is computed once, and not in each layer.
    whole = masks_of(jnp.arange(count)) if count <= QUERIES_AT_ONCE else None
    return filled, lambda kind, tokens: (masks_of(tokens) if whole is None else whole)[0 if kind is None else kind]


def with_first_tokens(cache: KVCache, keys: Array, values: Array) -> KVCache:
    """Return an empty cache with the keys and values `[layers, b or 1, kv_heads, n, head_dim]` of its first n tokens."""
    n = keys.shape[3]
    return KVCache(
        cache.keys.at[:, :, :, :n].set(keys.astype(cache.keys.dtype)),
        cache.values.at[:, :, :, :n].set(values.astype(cache.values.dtype)),
        cache.filled.at[:, :n].set(True),
        jnp.asarray(n, jnp.int32),
    )
