"""The device programs of the engine, all of fixed shapes.

    prefill_chunk   the next `chunk` tokens of one row's prompt, or the next few of several rows' prompts
                                                                     -> the cache; after a prompt's last token, its logits
    decode_rows     one token for each of R rows of B                -> the cache, the rows' logits
    sample_rows     the logits of R rows of B                        -> one token for each row, kept on the device

and two small ones that copy: `copy_row` gives a row the keys and values of another one, whose text begins in the same way,
and `begin_row` sets what sampling remembers of a row's text. All that changes from request to request are values of arrays,
except two sizes, for each of which there are a few values (`buckets`) and as many programs: the number R of rows, so that
few answers do not cost what many do, and the reach, the number of first slots of a row that attention reads. The cache, the
logits and the memory are donated, so that no step copies them.

An entry of the R that has no row has the number B: its tokens go to the last slots of the last row, which no text uses, and
its logits and its memory go nowhere. If R is B, entry i is row i or none, so that nothing is gathered.
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
from qlora_jax.serve.row_sampling import Drawn, Draws, RowMemory, RowSettings, empty_memory

__all__ = [
    "Chunk",
    "DeviceState",
    "RowDecoder",
    "Tokens",
    "begin_row",
    "buckets",
    "copy_row",
    "decode_rows",
    "empty_state",
    "prefill_chunk",
    "sample_rows",
]


def buckets(least: int, most: int) -> tuple[int, ...]:
    """Return the sizes that programs are compiled for: `least`, four times that, …, and `most` instead of one near it."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(4 * sizes[-1] if 16 * sizes[-1] < 3 * most else most)
    return tuple(sizes)


class RowDecoder(Protocol):
    """A model that the engine can use. The cache is any pytree of arrays whose second axis is that of the rows."""

    def init_cache(self, batch_size: int, capacity: int) -> Any:
        """Return an empty cache for `capacity` tokens per row."""
        ...

    def decode(
        self,
        tokens: Array,
        positions: Array,
        cache: Any,
        *,
        lengths: Array | None = None,
        rows: Array | None = None,
        reach: int | None = None,
        **adapters: Array,
    ) -> tuple[Array, Any]:
        """Process new tokens; return (logits of each row's last token `[b, v]`, the cache including the new tokens).

        Args:
            tokens: int32 `[b, t]`, padded on the right.
            positions: int32 `[b, t]`, increasing by one in each row, negative for padding.
            cache: the cache of the tokens so far; its slots after a row's first new token may contain any finite values.
            lengths: int32 `[b]`, the lengths of the whole texts, if `tokens` are only a part of them.
            rows: int32 `[b]`, the rows of the cache that the tokens belong to; numbers beyond it stand for its last row.
                None: all of them, in their order.
            reach: the number of first tokens of each row that the new ones attend to; None: the capacity.
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


def empty_state(model: RowDecoder, rows: int, capacity: int, vocabulary: int) -> DeviceState:
    """Return the state of rows without texts, with room for `capacity` tokens in each."""
    logits = jnp.zeros((rows, vocabulary), jnp.float32)
    return DeviceState(model.init_cache(rows, capacity), logits, empty_memory(rows, vocabulary))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Parts of the prompts of R rows.

    Attributes:
        tokens: int32 `[R, t]`, padded on the right.
        positions: int32 `[R, t]`, -1 for padding; the cache's last slots for an entry without a row.
        rows: int32 `[R]`; B for an entry without a row.
        lengths: int32 `[R]`, those of the whole texts.
        adapter_ids: int32 `[R]`.
    """

    tokens: Array | np.ndarray
    positions: Array | np.ndarray
    rows: Array | np.ndarray
    lengths: Array | np.ndarray
    adapter_ids: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The rows that take part in a step of decoding.

    Attributes:
        rows: int32 `[R]`, R <= B; B for an entry without a row. If R is B, entry i is i or B.
        positions: int32 `[R]`, of the tokens that the rows drew last; the cache's last slot for an entry without a row.
        adapter_ids: int32 `[R]`.
    """

    rows: Array | np.ndarray
    positions: Array | np.ndarray
    adapter_ids: Array | np.ndarray


@partial(jax.jit, static_argnames=("graphdef", "capacity", "reach", "banked"), donate_argnames="device")
def prefill_chunk(
    graphdef: Any, state: Any, device: DeviceState, chunk: Chunk, *, capacity: int, reach: int, banked: bool
) -> DeviceState:
    """Process parts of rows' prompts; the logits of each one's last token become those of its row.

    The chunk has one row if the cache of the model depends on the lengths of the texts.
    """
    model: Any = nnx.merge(graphdef, state)
    cache, rows = device.cache, jnp.asarray(chunk.rows)
    if isinstance(model, LengthDependent) and model.cache_lasts(1) is not None:
        # The first slots may hold virtual tokens, whose keys then depend on the length of the text as well.
        row = rows[0]
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1), cache)
        begins, fresh = chunk.positions[0, 0] == 0, model.init_cache(1, capacity, jnp.asarray(chunk.lengths))
        own = jax.tree.map(partial(jnp.where, begins), fresh, own)
        cache = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=1), cache, own)
    adapters: dict[str, Any] = {"adapter_ids": jnp.asarray(chunk.adapter_ids)} if banked else {}
    decoder = cast(RowDecoder, model)
    tokens, positions, lengths = (jnp.asarray(x) for x in (chunk.tokens, chunk.positions, chunk.lengths))
    fixed: dict[str, Any] = {"lengths": lengths, "rows": rows, "reach": reach}
    logits, cache = decoder.decode(tokens, positions, cache, **fixed, **adapters)
    return DeviceState(cache, device.logits.at[rows].set(logits.astype(jnp.float32), mode="drop"), device.memory)


@partial(jax.jit, static_argnames=("graphdef", "reach", "banked"), donate_argnames="device")
def decode_rows(graphdef: Any, state: Any, device: DeviceState, tokens: Tokens, *, reach: int, banked: bool) -> DeviceState:
    """Process the token that each row drew last.

    Args:
        graphdef, state: `nnx.split` of the model.
        device: what stays on the device.
        tokens: the rows that take part.
        reach: at least one more than the largest position of a row.
        banked: whether the model takes `adapter_ids`.
    """
    model: RowDecoder = nnx.merge(graphdef, state)
    rows, positions = jnp.asarray(tokens.rows), jnp.asarray(tokens.positions)
    adapters: dict[str, Any] = {"adapter_ids": jnp.asarray(tokens.adapter_ids)} if banked else {}
    whole = rows.size == device.logits.shape[0]
    last = device.memory.token if whole else device.memory.token.at[rows].get(mode="clip")
    chosen: dict[str, Any] = {"rows": None if whole else rows, "reach": reach}
    logits, cache = model.decode(last[:, None], positions[:, None], device.cache, **chosen, **adapters)
    logits = logits.astype(jnp.float32)
    if whole:
        logits = jnp.where((rows < rows.size)[:, None], logits, device.logits)
    else:
        logits = device.logits.at[rows].set(logits, mode="drop")
    return DeviceState(cache, logits, device.memory)


@partial(jax.jit, donate_argnames="device")
def sample_rows(device: DeviceState, settings: RowSettings, draws: Draws) -> tuple[Drawn, DeviceState]:
    """Draw one token for each of some rows; see `row_sampling.sample_rows`."""
    drawn, memory = row_sampling.sample_rows(device.logits, device.memory, settings, draws)
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
