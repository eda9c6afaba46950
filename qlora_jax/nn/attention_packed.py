"""Attention within the documents of packed rows by calls of cuDNN's kernel, in memory that is linear in the length.

A row is halved again and again. Between the halves of a part of the row, only the document that crosses the border counts:
its tokens are the first queries of the right half and the last keys of the left half, and all of these queries attend to all
of these keys. With the keys in reverse order both are the first ones, as many as the kernel is told.

    keys      0 ............ T        H: halves of the row       one call for the row
    queries | L             |         h: halves of halves        one call, with the two as rows of a batch
            | h L           |         L: leaves, tokens of at    XLA, with a mask
            | H H L         |            most 128
            | H H h L       |

    row       a a a a a b b b | b b c c c c _ _       queries: 2 of the right half; keys: 3 of the left half

Together the calls have as many scores as causal attention. cuDNN skips those beyond the numbers it is told, so that the cost
is that of the documents. No array grows with the square of the length, and there may be any number of documents.

Each call returns its result and the logarithm of its softmax's normalizer, from which the whole result follows; and given
those of the whole softmax, the backward pass of a call returns its part of the gradients. Parts are added in float32. This
is how attention is split over devices in ring attention (Liu et al. 2023), here over calls of one device.

A window of w tokens splits the row into pieces of w tokens. Within a piece the window hides nothing. Token i of a piece
attends to the tokens j > i of the piece before it, which is causal attention if both pieces are reversed, and the queries
moved on by one. The tokens that all documents attend to are one more call.

Long rows are computed for some of the heads at a time, which bounds what the calls take and return. cuDNN's own layout of
packed rows is of no use here: XLA describes each document as a row of full length to it, so that statistics and workspace
grow with the number of documents, and it exists from Hopper on only.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qlora_jax.nn.attention_cudnn import flash_attention, flash_gradients
from qlora_jax.nn.attention_target import LEAF
from qlora_jax.nn.attention_tiles import tile_attention, tile_gradients
from qlora_jax.nn.parallel import shard_rows
from qlora_jax.nn.residuals import name_in_rule

# Bytes of queries: of those whose heads are computed at once, and else of the heads that are computed at a time.
_SMALL, _AT_ONCE = 2**26, 2**25
_NO_WEIGHT = 1e30  # the logarithm of a normalizer beside which every weight is 0
_SHARED = 2**30  # the number of the document that shared tokens are


def packed_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t kv_heads d"],
    v: Float[Array, "b t kv_heads d"],
    segment_ids: Int[Array, "b t"],
    *,
    window: int | None,
    scale: float,
    shared: int,
) -> Float[Array, "b t heads d"]:
    """Return causal attention, `[b, t, heads, d]`; see `attention.causal_attention` for the arguments.

    The tokens of a segment must be neighbours. `window` and `shared` cannot be used together.
    """
    (_, length, heads, d), kv_heads = q.shape, k.shape[2]
    if shared:
        segment_ids = jnp.where(jnp.arange(length) < shared, _SHARED, segment_ids)
    real = length if window is None else window
    pieces, halvings, size = -(-length // real), _halvings(real), padded_length(real)
    leaf = size >> halvings

    def split(x: Array) -> Array:
        """Return the row in pieces, zeros before each of them and after the last token."""
        rest = [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, ((0, 0), (0, pieces * real - length), *rest))
        x = jnp.pad(x.reshape(x.shape[0], pieces, real, *x.shape[2:]), ((0, 0), (0, 0), (size - real, 0), *rest))
        return x.reshape(x.shape[0], pieces * size, *x.shape[3:])

    parts: list[_Part] = [_Halves(leaf * 2**level) for level in range(halvings)]
    parts += [_Before(size)] if pieces > 1 else []
    parts += [_Shared(size - real, shared)] if shared else []

    def attend(q: Array, k: Array, v: Array, ids: Array) -> Array:
        at_once = heads_at_once(q.shape[0] * length, heads, kv_heads, d, q.dtype.itemsize)
        settings = _Settings(tuple(parts), leaf, scale, at_once)
        attended: Any = _packed(*(split(x) for x in (q, k, v, ids)), settings)
        return attended

    out = shard_rows(attend)(q, k, v, segment_ids)
    return out.reshape(-1, pieces, size, heads, d)[:, :, size - real :].reshape(-1, pieces * real, heads, d)[:, :length]


def padded_length(length: int) -> int:
    """Return the tokens of a row without a window as they are computed, with zeros before the first one."""
    return -(-length // (8 << _halvings(length))) * (8 << _halvings(length))


def _halvings(length: int) -> int:
    return max(0, -(-length // LEAF) - 1).bit_length()


def heads_at_once(tokens: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Return the number of key heads that are computed at a time, of so many tokens on a device."""
    of_one = tokens * heads // kv_heads * head_dim * itemsize
    if of_one * kv_heads <= _SMALL:
        return kv_heads
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n == 1 or n * of_one <= _AT_ONCE))


class _Seen(NamedTuple):
    """What a part computes, with n rows in its batch.

    Attributes:
        queries: bool `[n, queries]`, those that attend to keys of the part.
        keys: bool `[n, keys]`, those that the queries attend to: the first ones of each row.
        lengths: int32 `[n]` twice, the first queries and the first keys that the kernel computes, at least one.
    """

    queries: Array
    keys: Array
    lengths: tuple[Array, Array]


class _Part(Protocol):
    """A part of attention that is one call of the kernel. Instances are compile-time constants, and so must be hashable."""

    @property
    def causal(self) -> bool: ...

    def queries(self, x: Array) -> Array:
        """Return the queries of the part, `[n, queries, …]`, of `[b, t, …]`."""
        ...

    def keys(self, x: Array) -> Array:
        """Return the keys of the part, `[n, keys, …]`, of `[b, t, …]`."""
        ...

    def seen(self, ids: Array) -> _Seen:
        """Return what is computed for the segments int32 `[b, t]`."""
        ...


@dataclasses.dataclass(frozen=True)
class _Halves:
    """The tokens of each right half and those of the left half before it, halves of `size` tokens."""

    size: int
    causal: bool = False

    def _halves(self, x: Array) -> Array:
        return x.reshape(-1, 2, self.size, *x.shape[2:])

    def queries(self, x: Array) -> Array:
        return self._halves(x)[:, 1]

    def keys(self, x: Array) -> Array:
        return self._halves(x)[:, 0, ::-1]

    def seen(self, ids: Array) -> _Seen:
        return _seen(self.queries(ids), self.keys(ids))


@dataclasses.dataclass(frozen=True)
class _Before:
    """The tokens of each piece of `size` tokens but the first, and the later ones of the piece before it."""

    size: int
    causal: bool = True

    def _pieces(self, x: Array) -> Array:
        return x.reshape(x.shape[0], -1, self.size, *x.shape[2:])[:, :, ::-1]

    def queries(self, x: Array) -> Array:
        x = self._pieces(x)[:, 1:, 1:]  # the last token of a piece has no later one
        x = x.reshape(-1, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)))

    def keys(self, x: Array) -> Array:
        x = self._pieces(x)[:, :-1]
        return x.reshape(-1, *x.shape[2:])

    def seen(self, ids: Array) -> _Seen:
        queries, keys, (_, valid_keys) = _seen(self.queries(ids), self.keys(ids))
        return _Seen(queries, keys, (jnp.full_like(valid_keys, self.size), valid_keys))  # the queries are the last ones


@dataclasses.dataclass(frozen=True)
class _Shared:
    """All tokens after the `count` shared ones, which begin at `start`, and these."""

    start: int
    count: int
    causal: bool = False

    def queries(self, x: Array) -> Array:
        return x[:, self.start + self.count :]

    def keys(self, x: Array) -> Array:
        return x[:, self.start : self.start + self.count]

    def seen(self, ids: Array) -> _Seen:
        queries, keys = self.queries(ids), self.keys(ids)
        lengths = tuple(jnp.full(x.shape[:1], x.shape[1], jnp.int32) for x in (queries, keys))
        return _Seen(queries != 0, jnp.ones_like(keys, bool), (lengths[0], lengths[1]))


def _seen(queries: Array, keys: Array) -> _Seen:
    """Return the queries and keys, given by their segments `[n, …]`, of the document that the first key belongs to."""
    crossing = jnp.where(keys[:, :1] == 0, -1, keys[:, :1])
    seen_queries = queries == crossing
    seen_keys = (keys == crossing) & jnp.any(seen_queries, axis=1, keepdims=True)
    lengths = tuple(jnp.maximum(1, jnp.sum(x, axis=1, dtype=jnp.int32)) for x in (seen_queries, seen_keys))
    return _Seen(seen_queries, seen_keys, (lengths[0], lengths[1]))


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is known at compile time; `heads` is the number of key heads that are computed at a time."""

    parts: tuple[_Part, ...]
    leaf: int
    scale: float
    heads: int


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _packed(q: Array, k: Array, v: Array, ids: Array, settings: _Settings) -> Array:
    """Return the attention `[b, t, heads, d]` of q `[b, t, heads, d]` to k and v `[b, t, kv_heads, d]`."""
    return _forward(q, k, v, ids, settings)[0]


def _forward(q: Array, k: Array, v: Array, ids: Array, settings: _Settings) -> tuple[Array, tuple[Array, ...]]:
    compute = partial(_forward_heads, ids=ids, settings=settings)
    out, logs = _by_heads(compute, (q, k, v), k.shape[2] // settings.heads)
    out, logs = name_in_rule(out, "attention"), name_in_rule(logs, "attention")
    return out, (q, k, v, ids, out, logs)


def _backward(settings: _Settings, residuals: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, ids, out, logs = residuals
    compute = partial(_backward_heads, ids=ids, settings=settings)
    dq, dk, dv = _by_heads(compute, (q, k, v, out, logs, gradient), k.shape[2] // settings.heads)
    return dq, dk, dv, None


_packed.defvjp(_forward, _backward)


def _by_heads(compute: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], steps: int) -> tuple[Array, ...]:
    """Return compute(*arrays), computed for equal shares of the heads, axis 2 of all arrays and results, one by one."""
    if steps == 1:
        return compute(*arrays)

    def share(x: Array, step: Array) -> Array:
        size = x.shape[2] // steps
        return jax.lax.dynamic_slice_in_dim(x, step * size, size, 2)

    def put(whole: Array, part: Array, step: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, step * part.shape[2], 2)

    def add(results: tuple[Array, ...], step: Array) -> tuple[tuple[Array, ...], None]:
        parts = compute(*(share(x, step) for x in arrays))
        return tuple(put(whole, part, step) for whole, part in zip(results, parts, strict=True)), None

    shapes = jax.eval_shape(compute, *(jax.eval_shape(partial(share, step=jnp.int32(0)), x) for x in arrays))
    start = tuple(jnp.zeros((*x.shape[:2], x.shape[2] * steps, *x.shape[3:]), x.dtype) for x in shapes)
    return jax.lax.scan(add, start, jnp.arange(steps))[0]


def _forward_heads(q: Array, k: Array, v: Array, *, ids: Array, settings: _Settings) -> tuple[Array, Array]:
    """Return (result, logarithm of the normalizer), `[b, t, heads, d]` and float32 `[b, t, heads]`."""
    out, log = tile_attention(*(_leaves(x, settings) for x in (q, k, v, ids)), scale=settings.scale)
    outs, logs = [out.reshape(q.shape)], [log.reshape(q.shape[:3])]
    for part in settings.parts:
        seen = part.seen(ids)
        operands = part.queries(q), part.keys(k), part.keys(v)
        out, log = flash_attention(*operands, seen.lengths, scale=settings.scale, causal=part.causal)
        mask = seen.queries[..., None]
        outs.append(_put(part.queries, q, jnp.where(mask[..., None], out, 0)))
        log = _put(part.queries, logs[0], jnp.where(mask, log.swapaxes(1, 2), 0))
        has_weight = _put(part.queries, logs[0][..., :1], mask.astype(jnp.float32)) > 0
        logs.append(jnp.where(has_weight, log, -jnp.inf))
    total = jax.nn.logsumexp(jnp.stack(logs), axis=0)
    weights = (jnp.exp(log - total)[..., None] for log in logs)
    return _sum([weight * out for weight, out in zip(weights, outs, strict=True)], q.dtype), total


def _backward_heads(
    q: Array, k: Array, v: Array, out: Array, logs: Array, gradient: Array, *, ids: Array, settings: _Settings
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v."""
    of_tile = q, k, v, ids, (out, logs, gradient)
    of_leaves = tile_gradients(*jax.tree.map(partial(_leaves, settings=settings), of_tile), scale=settings.scale)
    sums = [[found.reshape(x.shape)] for found, x in zip(of_leaves, (q, k, v), strict=True)]
    for part in settings.parts:
        seen = part.seen(ids)
        mask, valid_keys = seen.queries[..., None], seen.keys[..., None, None]
        # What cuDNN computes for the other queries is 0, and not infinite, with these.
        log = jnp.where(mask, part.queries(logs), _NO_WEIGHT).swapaxes(1, 2)
        back = jnp.where(mask[..., None], part.queries(gradient), 0)
        operands = part.queries(q), part.keys(k), part.keys(v), (part.queries(out), log, back), seen.lengths
        found = flash_gradients(*operands, scale=settings.scale, causal=part.causal)
        for total, x, part_of, take, valid in zip(
            sums,
            (q, k, v),
            found,
            (part.queries, part.keys, part.keys),
            (mask[..., None], valid_keys, valid_keys),
            strict=True,
        ):
            total.append(_put(take, x, jnp.where(valid, part_of, 0)))
    dq, dk, dv = (_sum(parts, x.dtype) for parts, x in zip(sums, (q, k, v), strict=True))
    return dq, dk, dv


def _leaves(x: Array, settings: _Settings) -> Array:
    return x.reshape(-1, settings.leaf, *x.shape[2:])


def _put(take: Callable[[Array], Array], like: Array, part: Array) -> Array:
    """Return an array of zeros of the shape of `like`, but for the elements that `take` takes, which are those of `part`."""
    shape = jax.ShapeDtypeStruct(like.shape, part.dtype)
    return jax.linear_transpose(take, shape)(part)[0]


def _sum(parts: list[Array], dtype: Any) -> Array:
    return sum((part.astype(jnp.float32) for part in parts[1:]), parts[0].astype(jnp.float32)).astype(dtype)
