"""The cache of keys and values of past tokens, for decoding.

    row 0   v v a b c d e _ _      each row fills its own slots from the first one on: the virtual tokens v, then the token
    row 1   v v f g _ _ _ _ _      of position p in slot p + (number of virtual tokens)

A token attends to the slots up to its own. So a row has its own length, which is not stored, because the positions of the
new tokens tell it; and what lies in the slots after it (padding of a prompt, tokens of an earlier text) is never read.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Int

from qlora_jax.models.config import DecoderConfig
from qlora_jax.nn.attention import QUERIES_AT_ONCE
from qlora_jax.nn.parallel import split_heads
from qlora_jax.quant import by_platform

MaskOf = Callable[[Array | None, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, for decoding.

    Attributes:
        keys, values: `[layers, b, kv_heads, capacity, head_dim]`. Attention multiplies with them in this order; with another
            order, a compiler may copy all of them in every step.
    """

    keys: Array
    values: Array


def empty_cache(config: DecoderConfig, dtype: DTypeLike, batch_size: int, capacity: int) -> KVCache:
    """Return an empty cache for `capacity` tokens per row."""
    shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
    # Two different buffers, because a buffer can be donated only once.
    return KVCache(split_heads(jnp.zeros(shape, dtype), 2), split_heads(jnp.zeros(shape, dtype), 2))


def cache_masks(config: DecoderConfig, capacity: int, slots: Int[Array, "b t"]) -> MaskOf:
    """Return the slots that each new token attends to, as a function that computes the mask for some of the tokens.

    The function takes the index of a layer's kind of attention (None: the only one) and the numbers of new tokens `[n]`; it
    returns bool `[b, n, capacity]`. So the mask of a long prompt is never stored as a whole.

    Args:
        config: the configuration of the model.
        capacity: the number of slots of a row.
        slots: int32 `[b, t]`, the slots of the new tokens; negative for padding, which attends to nothing.
    """
    count, others = slots.shape[1], jnp.arange(capacity)[None, None]

    def masks_of(tokens: Array) -> Array:
        own = slots[:, tokens, None]
        mask = others <= own
        windows = [kind.window for kind in config.kinds]
        return jnp.stack([mask if window is None else mask & (others > own - window) for window in windows])

    # Of few tokens the mask is computed once, and not in each layer.
    whole = masks_of(jnp.arange(count)) if count <= QUERIES_AT_ONCE else None
    return lambda kind, tokens: (masks_of(tokens) if whole is None else whole)[0 if kind is None else kind]


@dataclasses.dataclass(frozen=True)
class View:
    """The part of a cache that new tokens are written into and attend to.

    Attributes:
        rows: int32 `[b]`, the rows of the cache that the tokens belong to; a number beyond the cache stands for its last
            row. None: all rows, in their order.
        reach: the number of first slots of each row that the tokens attend to.
    """

    rows: Int[Array, " b"] | None
    reach: int

    def extended(self, past: KVCache, k: Array, v: Array, layer: Array, first: Int[Array, " b"]) -> tuple[KVCache, KVCache]:
        """Write the keys and values of new tokens into one layer; return (the cache of all layers, what to attend to).

        Args:
            past: the cache of all layers.
            k, v: `[b, t, kv_heads, head_dim]`, of tokens in neighbouring slots.
            layer: int32 scalar, the layer.
            first: int32 `[b]`, the slot of each row's first token; the slots of all tokens must be within the capacity.

        Returns:
            The second cache has one layer and no axis for it: `[b, kv_heads, reach, head_dim]`.
        """
        keys, values = self._write(past.keys, k, layer, first), self._write(past.values, v, layer, first)
        return KVCache(keys, values), KVCache(self._read(keys, layer), self._read(values, layer))

    def _write(self, past: Array, new: Array, layer: Array, first: Array) -> Array:
        new, forms = new.swapaxes(1, 2).astype(past.dtype), {"tpu": _write_row_by_row, "cpu": _write_row_by_row}
        default = _write_tokens if new.shape[2] == 1 else _write_row_by_row
        if self.rows is not None:
            rows = jnp.minimum(self.rows, past.shape[1] - 1)
        else:
            rows = jnp.arange(past.shape[1])
            if jax.sharding.get_abstract_mesh().size <= 1:  # XLA cannot spread the scatter of `_write_rows` over devices
                default = _write_rows
        return by_platform(past, new, layer, first, rows, **forms, default=default)

    def _read(self, past: Array, layer: Array) -> Array:
        count = past.shape[1]
        if self.rows is None:
            return jax.lax.dynamic_index_in_dim(past, layer, keepdims=False)[:, :, : self.reach]
        # Layers and rows are one axis, and a slice of each row is one slice of a gather: nothing else is copied.
        flat, size = past.reshape(-1, *past.shape[2:]), (1, past.shape[2], self.reach, past.shape[4])
        start = layer * count + jnp.minimum(self.rows, count - 1)
        return jax.vmap(lambda row: jax.lax.dynamic_slice(flat, (row, 0, 0, 0), size)[0])(start)


def _write_rows(past: Array, new: Array, layer: Array, first: Array, rows: Array) -> Array:
    """Write the tokens of all rows at once: one kernel on a GPU."""
    del rows

    def write(row: Array, tokens: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice(row, tokens[None], (layer, 0, start, 0))

    return jax.vmap(write, in_axes=(1, 0, 0), out_axes=1)(past, new, first)


def _write_tokens(past: Array, new: Array, layer: Array, first: Array, rows: Array) -> Array:
    """Write one token of each row at once: one kernel on a GPU."""
    return past.at[layer, rows, :, first].set(new[:, :, 0], mode="promise_in_bounds")


def _write_row_by_row(past: Array, new: Array, layer: Array, first: Array, rows: Array) -> Array:
    """Write the tokens of one row after the other, for TPUs and CPUs, where a scatter copies what it writes into.

    Without the constraint, the compiler orders the axes of the whole cache like those of the new tokens, and converts it
    before and after the loop over the layers: with 8 rows of 2048 tokens of an 8B model, that is twice the traffic.
    """
    for index in range(new.shape[0]):
        start = (layer, rows[index], 0, first[index], 0)
        past = jax.lax.dynamic_update_slice(past, new[None, index : index + 1], start)
    return with_layout_constraint(past, Layout(major_to_minor=tuple(range(past.ndim))))


def with_first_tokens(cache: KVCache, keys: Array, values: Array) -> KVCache:
    """Return a cache with the keys and values `[layers, b or 1, kv_heads, n, head_dim]` of the first n slots."""
    n = keys.shape[3]
    return KVCache(
        cache.keys.at[:, :, :, :n].set(keys.astype(cache.keys.dtype)),
        cache.values.at[:, :, :, :n].set(values.astype(cache.values.dtype)),
    )
