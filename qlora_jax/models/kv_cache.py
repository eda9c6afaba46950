"""The cache of keys and values of past tokens, for decoding."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.models.config import DecoderConfig


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
