"""The device programs of the engine, all of fixed shapes.

    prefill_chunk   the next `chunk` tokens of one row's prompt      -> the cache; after the last chunk, the row's logits
    decode_rows     one token for each of B rows                     -> the cache, the rows' logits
    sample_rows     the rows' logits                                 -> one token for each row, kept on the device

and two small ones that copy: `copy_row` gives a row the keys and values of another one, whose text begins in the same way,
and `begin_row` sets what sampling remembers of a row's text. Each is compiled once, because all that changes from request to
request are values of arrays. The cache, the logits and the memory are donated, so that no step copies them.

A row that takes no part in a step still computes: its token goes to the cache's last slot, which no text uses, and its
logits and its memory stay as they are.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.serve import row_sampling
from qlora_jax.serve.generate import LengthDependent
from qlora_jax.serve.row_sampling import Drawn, RowMemory, RowSettings

__all__ = ["Chunk", "DeviceState", "RowDecoder", "begin_row", "copy_row", "decode_rows", "prefill_chunk", "sample_rows"]


class RowDecoder(Protocol):
    """A model that the engine can use. The cache is any pytree of arrays whose second axis is that of the rows."""

    def init_cache(self, batch_size: int, capacity: int) -> Any:
        """Return an empty cache for `capacity` tokens per row."""
        ...

    def decode(
        self, tokens: Array, positions: Array, cache: Any, *, lengths: Array | None = None, **adapters: Array
    ) -> tuple[Array, Any]:
        """Process new tokens; return (logits of each row's last token `[b, v]`, the cache including the new tokens).

        Args:
            tokens: int32 `[b, t]`, padded on the right.
            positions: int32 `[b, t]`, increasing by one in each row, negative for padding.
            cache: the cache of the tokens so far; its slots after a row's first new token may contain any finite values.
            lengths: int32 `[b]`, the lengths of the whole texts, if `tokens` are only a part of them.
            adapters: `adapter_ids`, int32 `[b]`, for a model with a bank of adapters; nothing for others.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """All that the programs keep on the device: the cache, float32 logits `[B, v]`, and the memory of sampling."""

    cache: Any
    logits: Array
    memory: RowMemory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of one row's prompt.

    Attributes:
        tokens: int32 `[1, chunk]`, padded on the right.
        positions: int32 `[1, chunk]`, -1 for padding.
        row: int32 scalar.
        length: int32 `[1]`, the length of the whole text.
        adapter_ids: int32 `[1]`.
    """

    tokens: Array | np.ndarray
    positions: Array | np.ndarray
    row: Array | np.ndarray
    length: Array | np.ndarray
    adapter_ids: Array | np.ndarray


@partial(jax.jit, static_argnames=("graphdef", "capacity", "banked"), donate_argnames="device")
def prefill_chunk(
    graphdef: Any, state: Any, device: DeviceState, chunk: Chunk, *, capacity: int, banked: bool
) -> DeviceState:
    """Process a chunk of one row's prompt; its last token's logits become those of the row."""
    model: Any = nnx.merge(graphdef, state)
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, chunk.row, 1, axis=1), device.cache)
    if isinstance(model, LengthDependent) and model.cache_lasts(1) is not None:
        # The first slots may hold virtual tokens, whose keys then depend on the length of the text as well.
        begins, fresh = chunk.positions[0, 0] == 0, model.init_cache(1, capacity, jnp.asarray(chunk.length))
        own = jax.tree.map(partial(jnp.where, begins), fresh, own)
    adapters = {"adapter_ids": jnp.asarray(chunk.adapter_ids)} if banked else {}
    decoder = cast(RowDecoder, model)
    tokens, positions, length = (jnp.asarray(x) for x in (chunk.tokens, chunk.positions, chunk.length))
    logits, own = decoder.decode(tokens, positions, own, lengths=length, **adapters)
    cache = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, chunk.row, axis=1), device.cache, own)
    return DeviceState(cache, device.logits.at[chunk.row].set(logits[0].astype(jnp.float32)), device.memory)


@partial(jax.jit, static_argnames=("graphdef", "banked"), donate_argnames="device")
def decode_rows(
    graphdef: Any, state: Any, device: DeviceState, positions: Array, active: Array, adapter_ids: Array, *, banked: bool
) -> DeviceState:
    """Process the token that each row drew last.

    Args:
        positions: int32 `[B]`, of these tokens; the cache's last slot for rows that take no part.
        active: bool `[B]`, the rows that take part.
        adapter_ids: int32 `[B]`.
    """
    model: RowDecoder = nnx.merge(graphdef, state)
    adapters = {"adapter_ids": adapter_ids} if banked else {}
    logits, cache = model.decode(device.memory.token[:, None], positions[:, None], device.cache, **adapters)
    logits = jnp.where(active[:, None], logits.astype(jnp.float32), device.logits)
    return DeviceState(cache, logits, device.memory)


@partial(jax.jit, donate_argnames="device")
def sample_rows(
    device: DeviceState, settings: RowSettings, steps: Array, active: Array, allowed: Array
) -> tuple[Drawn, DeviceState]:
    """Draw one token for each active row; see `row_sampling.sample_rows`."""
    drawn, memory = row_sampling.sample_rows(device.logits, device.memory, settings, steps, active, allowed)
    return drawn, DeviceState(device.cache, device.logits, memory)


@partial(jax.jit, donate_argnames="device")
def begin_row(device: DeviceState, row: Array, counts: Array, in_prompt: Array, bias: Array) -> DeviceState:
    """Set what sampling remembers of the text of one row (`row_sampling.begin_row`), and clean the row's cache.

    Attention reads the slots after a text with the weight 0. A NaN that another tenant's adapter left there would still
    reach the result, so values that are not finite become 0.
    """

    def clean(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        own = jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)
        own = jnp.where(jnp.isfinite(own), own, jnp.zeros_like(own))
        return jax.lax.dynamic_update_slice_in_dim(x, own, row, axis=1)

    memory = row_sampling.begin_row(device.memory, row, counts, in_prompt, bias)
    return DeviceState(jax.tree.map(clean, device.cache), device.logits, memory)


@partial(jax.jit, donate_argnames="device")
def copy_row(device: DeviceState, source: Array, target: Array) -> DeviceState:
    """Give the row `target` the keys and values of the row `source`."""

    def copy(x: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(x, source, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=1)

    return DeviceState(jax.tree.map(copy, device.cache), device.logits, device.memory)
