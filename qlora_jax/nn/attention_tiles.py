"""Attention in memory that is linear in the length, with XLA alone: FlashAttention's loops over tiles of the scores.

    queries      | 0 | 1 | 2 | 3 |      keys     for each tile that contains a visible pair, by rows:
    tile         0                                  scores  = scale q kᵀ of the tile, masked            [n, rows, columns]
                 1   2                              highest, normalizer, out: updated (online softmax)
                 3   4   5                          backward: weights = exp(scores - log of the normalizer),
                 6   7   8   9                      dq of the row of tiles, dk and dv of the column of tiles: added to

One `scan` runs over the list of tiles, which is known at compile time, so that tiles in which no query may attend to a key
(later keys, keys before the window) are not in the program, and a GPU need not ask the host after each of them. Only the
scores of one tile are in memory. Sums are in float32, and so are the gradients until all tiles are added. The method is that
of FlashAttention (Dao et al. 2022, algorithms 1 and 4). `attention` uses it where no kernel of the platform applies and the
rows are long.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int

from qlora_jax.nn.attention_masks import CausalRows, Mask, Visible
from qlora_jax.nn.attention_target import AttentionTarget
from qlora_jax.nn.residuals import name_in_rule
from qlora_jax.quant.dense_matmul import einsum


def largest_tile(target: AttentionTarget) -> int:
    """Return the most queries and keys of a tile: a CPU's caches hold its scores, other devices have less to launch."""
    return 256 if target.platform == "cpu" else 512


def tile_of(length: int, largest: int) -> int:
    """Return the number of queries (or keys) of a tile, such that the last tile is nearly full."""
    tiles = -(-length // largest)
    return min(length, -(-length // (64 * tiles)) * 64)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is known at compile time; `heads` are the key heads, `queries` those of a padded row."""

    visible: Visible
    scale: float
    cap: float | None
    heads: int
    tile: tuple[int, int]
    queries: int


def tiled_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b s kv_heads d"],
    v: Float[Array, "b s kv_heads d"],
    mask: Mask,
    *,
    scale: float,
    cap: float | None = None,
    largest_tile: int = 512,
    distance_bias: Float32[Array, "heads distances"] | None = None,
) -> Float[Array, "b t heads d"]:
    """Compute attention tile by tile; the result is `[b, t, heads, d]` in the dtype of q.

    Args:
        q: `[b, t, heads, d]`.
        k: `[b, s, kv_heads, d]`.
        v: `[b, s, kv_heads, d]`.
        mask: which keys a query may attend to. For a query without any the result is finite.
        scale: factor on the scores q·k.
        cap: scores become cap * tanh(score / cap); None: no cap.
        largest_tile: the most queries and keys of a tile.
        distance_bias: float32 `[heads, t + s - 1]`, added to the scores: the value of key j for query i is at j - i + t - 1.
            It gets no gradient. None: no bias.
    """
    (b, t, heads, d), (s, kv_heads) = q.shape, k.shape[1:3]
    tile = tile_of(t, largest_tile), tile_of(s, largest_tile)
    more = [-length % size for length, size in zip((t, s), tile, strict=True)]
    q = _padded(q, more[0]).reshape(b, -1, kv_heads, heads // kv_heads, d).transpose(0, 2, 3, 1, 4)
    k, v = (_padded(x, more[1]).transpose(0, 2, 1, 3).reshape(b * kv_heads, -1, d) for x in (k, v))
    q = q.reshape(b * kv_heads, heads // kv_heads, -1, d)
    bias = None
    if distance_bias is not None:  # the number of queries grew, and so did the place of distance 0
        bias = jnp.pad(distance_bias, ((0, 0), (more[0], more[1]))).reshape(kv_heads, heads // kv_heads, -1)
    out: Any = _tiled(q, k, v, mask.arrays, bias, _Settings(mask.visible, scale, cap, kv_heads, tile, q.shape[2]))
    out = out.reshape(b, kv_heads, heads // kv_heads, -1, d).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, -1, heads, d)[:, :t]


def tile_attention(
    q: Float[Array, "n t heads d"],
    k: Float[Array, "n t kv_heads d"],
    v: Float[Array, "n t kv_heads d"],
    segment_ids: Int[Array, "n t"],
    *,
    scale: float,
) -> tuple[Float[Array, "n t heads d"], Float32[Array, "n t heads"]]:
    """Return (result, logarithm of the softmax's normalizer) of causal attention within segments, each row as one tile.

    Args:
        q: `[n, t, heads, d]`.
        k: `[n, t, kv_heads, d]`.
        v: `[n, t, kv_heads, d]`.
        segment_ids: int32 `[n, t]`; 0 is padding, whose results are finite.
        scale: factor on the scores q·k.
    """
    kv_heads = k.shape[2]
    out, residuals = _forward(*_one_tile(q, k, v), segment_ids, None, _settings_of_tile(k, scale))
    return _tokens_first(out, kv_heads), _tokens_first(residuals[-1], kv_heads)


def tile_gradients(
    q: Float[Array, "n t heads d"],
    k: Float[Array, "n t kv_heads d"],
    v: Float[Array, "n t kv_heads d"],
    segment_ids: Int[Array, "n t"],
    saved: tuple[Float[Array, "n t heads d"], Float32[Array, "n t heads"], Float[Array, "n t heads d"]],
    *,
    scale: float,
) -> tuple[Float[Array, "n t heads d"], Float[Array, "n t kv_heads d"], Float[Array, "n t kv_heads d"]]:
    """Return the gradients of q, k and v that come from the scores of `tile_attention`.

    Args:
        q, k, v, segment_ids: as in `tile_attention`.
        saved: (result, logarithm of the normalizer, gradient of the result) of a softmax over these and maybe more keys.
        scale: factor on the scores.
    """
    kv_heads = k.shape[2]
    out, logs, gradient = (_heads_first(x, kv_heads) for x in saved)
    residuals = (*_one_tile(q, k, v), segment_ids, None, out, logs)
    dq, dk, dv, *_ = _backward(_settings_of_tile(k, scale), residuals, gradient)
    return _tokens_first(dq, kv_heads), _tokens_first(dk[:, None], kv_heads), _tokens_first(dv[:, None], kv_heads)


def _settings_of_tile(k: Array, scale: float) -> "_Settings":
    length = k.shape[1]
    return _Settings(CausalRows(), scale, None, k.shape[2], (length, length), length)


def _one_tile(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Return q as `[n * kv_heads, group, t, d]`, k and v as `[n * kv_heads, t, d]`."""
    kv_heads = k.shape[2]
    return _heads_first(q, kv_heads), _heads_first(k, kv_heads)[:, 0], _heads_first(v, kv_heads)[:, 0]


def _heads_first(x: Array, kv_heads: int) -> Array:
    """Return `[n, t, heads, …]` as `[n * kv_heads, heads / kv_heads, t, …]`."""
    x = jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:]), 1, 3)
    return x.reshape(-1, *x.shape[2:])


def _tokens_first(x: Array, kv_heads: int) -> Array:
    """Return `[n * kv_heads, group, t, …]` as `[n, t, heads, …]`."""
    x = jnp.moveaxis(x.reshape(-1, kv_heads, *x.shape[1:]), 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _padded(x: Array, more: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x


def _tiles(q: Array, k: Array, settings: _Settings) -> tuple[Array, Array, Array]:
    """Return (row, column, whether the tile is the first of its row) of each tile, int32 and bool `[tiles]`."""
    (rows, columns), t, s = settings.tile, q.shape[2], k.shape[1]
    found: list[tuple[int, int, bool]] = []
    for i in range(t // rows):
        own = range(i * rows, (i + 1) * rows)
        seen = [j for j in range(s // columns) if settings.visible.reaches(own, range(j * columns, (j + 1) * columns))]
        found += [(i, j, j == seen[0]) for j in seen]
    i, j, first = (np.asarray(x) for x in zip(*found, strict=True))
    return jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32), jnp.asarray(first)


def _rows(x: Array, i: Array, size: int) -> Array:
    """Return the queries of row i of the tiles of `[n, group, t, d]`, as `[n, group * size, d]`."""
    part = jax.lax.dynamic_slice_in_dim(x, i * size, size, 2)
    return part.reshape(part.shape[0], -1, part.shape[-1])


def _columns(x: Array, j: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, j * size, size, 1)


def _with_rows(x: Array, part: Array, i: Array, size: int) -> Array:
    """Return `[n, group, t, …]` with the queries of row i of the tiles replaced."""
    part = part.reshape(*x.shape[:2], size, *x.shape[3:]).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * size, 2)


def _scores(
    qi: Array, kj: Array, tile: tuple[Array, Array], arrays: Any, bias: Array | None, settings: _Settings
) -> tuple[Array, Array]:
    """Return (scores before the bias, masked scores with it), float32 `[n, group * rows, columns]`."""
    (rows, columns), (i, j) = settings.tile, tile
    raw = einsum("ntd,nsd->nts", qi, kj, jnp.float32) * settings.scale
    raw = raw if settings.cap is None else settings.cap * jnp.tanh(raw / settings.cap)
    scores = raw.reshape(-1, settings.heads, raw.shape[1] // rows, rows, columns)
    if bias is not None:
        start = j * columns - i * rows + settings.queries - rows  # the distance of the tile's last query to its first key
        part = jax.lax.dynamic_slice_in_dim(bias, start, rows + columns - 1, 2)
        scores = scores + diagonals(part, rows, columns)
    mask = settings.visible.mask(arrays, i * rows + jnp.arange(rows), j * columns + jnp.arange(columns))
    return raw, jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min).reshape(raw.shape)


def diagonals(values: Array, rows: int, columns: int) -> Array:
    """Return `[..., rows, columns]` whose diagonals are the values `[..., rows + columns - 1]`, the lowest diagonal first.

    Each row is the row below it without its first value: the values, repeated and cut into rows of one more value.
    """
    size = rows + columns - 1
    repeated = jnp.tile(values, (*[1] * (values.ndim - 1), rows))
    repeated = jnp.pad(repeated, (*[(0, 0)] * (values.ndim - 1), (0, rows)))
    return repeated.reshape(*values.shape[:-1], rows, size + 1)[..., ::-1, :columns]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled(q: Array, k: Array, v: Array, arrays: Any, bias: Array | None, settings: _Settings) -> Array:
    """Return the attention `[n, group, t, d]` of q `[n, group, t, d]` to k and v `[n, s, d]`; n are rows times key heads."""
    return _forward(q, k, v, arrays, bias, settings)[0]


def _forward(
    q: Array, k: Array, v: Array, arrays: Any, bias: Array | None, settings: _Settings
) -> tuple[Array, tuple[Any, ...]]:
    (rows, columns), (n, group, t, d) = settings.tile, q.shape
    low = jnp.finfo(jnp.float32).min

    def step(carry: tuple[Array, ...], tile: tuple[Array, Array, Array]) -> tuple[tuple[Array, ...], None]:
        out, logs, highest, normalizer, total = carry
        i, j, first = tile
        highest = jnp.where(first, low, highest)
        normalizer, total = jnp.where(first, 0, normalizer), jnp.where(first, 0, total)
        _, scores = _scores(_rows(q, i, rows), _columns(k, j, columns), (i, j), arrays, bias, settings)
        now = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights, before = jnp.exp(scores - now[..., None]), jnp.exp(highest - now)
        normalizer = normalizer * before + jnp.sum(weights, axis=-1)
        values = _columns(v, j, columns)
        total = total * before[..., None] + einsum("nts,nsd->ntd", weights.astype(v.dtype), values, jnp.float32)
        # Written after each tile of the row; what the last one writes remains.
        out = _with_rows(out, total / normalizer[..., None], i, rows)
        logs = _with_rows(logs, now + jnp.log(normalizer), i, rows)
        return (out, logs, now, normalizer, total), None

    start = (
        jnp.zeros(q.shape, q.dtype),
        jnp.zeros((n, group, t), jnp.float32),
        *(jnp.zeros((n, group * rows), jnp.float32) for _ in range(2)),
        jnp.zeros((n, group * rows, d), jnp.float32),
    )
    (out, logs, *_), _ = jax.lax.scan(step, start, _tiles(q, k, settings))
    out, logs = name_in_rule(out, "attention"), name_in_rule(logs, "attention")
    return out, (q, k, v, arrays, bias, out, logs)


def _backward(settings: _Settings, residuals: Any, gradient: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, arrays, bias, out, logs = residuals
    rows, columns = settings.tile
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def step(sums: tuple[Array, Array, Array], tile: tuple[Array, Array, Array]) -> tuple[tuple[Array, ...], None]:
        dq, dk, dv = sums
        i, j, _ = tile
        qi, do = _rows(q, i, rows), _rows(gradient, i, rows)
        kj, vj = _columns(k, j, columns), _columns(v, j, columns)
        log, sum_of = (_rows(x[..., None], i, rows) for x in (logs, delta))
        raw, scores = _scores(qi, kj, (i, j), arrays, bias, settings)
        weights = jnp.exp(scores - log)
        dscores = weights * (einsum("ntd,nsd->nts", do, vj, jnp.float32) - sum_of) * settings.scale
        if settings.cap is not None:  # tanh' = 1 - tanh²
            dscores = dscores * (1 - (raw / settings.cap) ** 2)
        dscores, weights = dscores.astype(q.dtype), weights.astype(v.dtype)
        dqi = _rows(dq, i, rows) + einsum("nts,nsd->ntd", dscores, kj, jnp.float32)
        dkj = _columns(dk, j, columns) + einsum("nts,ntd->nsd", dscores, qi, jnp.float32)
        dvj = _columns(dv, j, columns) + einsum("nts,ntd->nsd", weights, do, jnp.float32)
        dk, dv = (jax.lax.dynamic_update_slice_in_dim(x, part, j * columns, 1) for x, part in ((dk, dkj), (dv, dvj)))
        return (_with_rows(dq, dqi, i, rows), dk, dv), None

    zeros: Any = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(step, zeros, _tiles(q, k, settings))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_tiled.defvjp(_forward, _backward)
