"""What a decoder reads of past tokens while it generates."""

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
        keys, values: `[layers, b, kv_heads, capacity, head_dim]`: as attention multiplies with them, since a compiler that
            wants another order copies all of them in every step.
        filled: bool `[b, capacity]`, true where a real token lies.
        length: int32 scalar, the slots used so far, by all rows alike (prompts are padded on the left).
    """

    keys: Array
    values: Array
    filled: Array
    length: Array


def empty_cache(config: DecoderConfig, dtype: DTypeLike, batch_size: int, capacity: int) -> KVCache:
    """Room for `capacity` tokens a row."""
    shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
    return KVCache(  # two buffers, not one twice: a buffer can be donated only once
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((batch_size, capacity), bool),
        jnp.zeros((), jnp.int32),
    )
