"""Scaled dot-product attention with grouped key-value heads.

`causal_attention` computes it with the kernel that `attention_target` chooses for the device. The kernel "blocks" is here:
XLA's attention by blocks of queries, which also serves decoding with a cache and scores with a bias. Where a block of
queries would have too many keys, the scores are computed tile by tile (`attention_tiles`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from qlora_jax.nn.attention_masks import CausalRows, KeyRows, Mask
from qlora_jax.nn.attention_packed import packed_attention
from qlora_jax.nn.attention_splash import splash_attention
from qlora_jax.nn.attention_target import CPU, AttentionTarget, choose_kernel
from qlora_jax.nn.attention_tiles import diagonals, largest_tile, tile_of, tiled_attention
from qlora_jax.nn.parallel import over_heads
from qlora_jax.nn.residuals import checkpoint_name, name_in_rule
from qlora_jax.quant.dense_matmul import einsum

# XLA's causal attention: a block has 128 queries, whose scores fit into a CPU's caches; there are at most 8 blocks, because
# each block adds to the size of the program. Longer rows are computed tile by tile.
_BLOCK, _MOST_BLOCKS = 128, 8
_LONGEST = _BLOCK * _MOST_BLOCKS
QUERIES_AT_ONCE = 512  # of a prompt, against the keys of the whole cache


def causal_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t kv_heads d"],
    v: Float[Array, "b t kv_heads d"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    shared: int = 0,
    target: AttentionTarget = CPU,
) -> Float[Array, "b t heads d"]:
    """Compute causal self-attention within segments.

    Args:
        q: `[b, t, heads, d]`, heads a multiple of kv_heads.
        k: `[b, t, kv_heads, d]`.
        v: `[b, t, kv_heads, d]`.
        segment_ids: int32 `[b, t]`; a token attends only to tokens of its own segment. The tokens of a segment are
            neighbours; 0 is padding, whose results are finite. None: each row is one segment (padding on the right needs no
            mask, because no earlier token attends to it).
        window: number of tokens that a token attends to, including itself; None: all earlier tokens.
        scale: factor on the scores q·k; None: d ** -0.5.
        cap: scores become cap * tanh(score / cap) (Gemma 2's soft-capping); None: no cap.
        shared: number of tokens at the start of a row that all of its segments attend to (virtual tokens).
        target: the device that the program is for, which decides the kernel (`attention_target.choose_kernel`).

    Returns:
        `[b, t, heads, d]` in the dtype of q.
    """
    (length, _, head_dim), segmented = q.shape[1:], segment_ids is not None
    scale = float(head_dim**-0.5 if scale is None else scale)
    window = None if window is None or window >= length else window
    kernel = choose_kernel(
        target, head_dim=head_dim, length=length, dtype=q.dtype, cap=cap, segmented=segmented, window=window, shared=shared
    )

    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        if kernel.name == "blocks":
            if length <= _LONGEST:
                return _in_blocks(q, k, v, segment_ids, window, scale, cap, shared)
            mask = Mask(CausalRows(window, shared), segment_ids)
            return tiled_attention(q, k, v, mask, scale=scale, cap=cap, largest_tile=largest_tile(target))
        # No token attends to the tokens that are added at the end, and zero features change nothing.
        more = ((0, 0), (0, kernel.length - length), (0, 0), (0, kernel.head_dim - head_dim))
        if more[1][1] or more[3][1]:
            q, k, v = (jnp.pad(x, more) for x in (q, k, v))
            segment_ids = None if segment_ids is None else jnp.pad(segment_ids, more[:2])
        if segment_ids is not None and kernel.name == "cudnn":
            return packed_attention(q, k, v, segment_ids, window=window, scale=scale, shared=shared)[..., :head_dim]
        if kernel.name == "splash":
            attended = splash_attention(q, k, v, segment_ids, window, scale, cap)
        else:
            local = None if window is None else (window - 1, 0)
            attended = jax.nn.dot_product_attention(
                q, k, v, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
            )
        return checkpoint_name(attended, "attention")[:, :length, :, :head_dim]

    return over_heads(attend, (q, 2), (k, 2), (v, 2), rows=segment_ids)


def scores_at_once(length: int, target: AttentionTarget, *, causal: bool = True) -> tuple[int, int]:
    """Return (queries, keys) of the largest array of scores of XLA's attention for rows of this length, of one head."""
    if length <= _LONGEST:
        return min(_BLOCK, length) if causal else length, length
    tile = tile_of(length, largest_tile(target))
    return tile, tile


def _in_blocks(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    window: int | None,
    scale: float,
    cap: float | None,
    shared: int,
) -> Array:
    """Compute causal attention with XLA, block by block of queries, each against the keys that its queries may attend to.

    With n blocks, only (n + 1) / 2n of the products are computed, and only the scores of one block are in memory. The
    gradients of keys and values are summed over the blocks in float32.
    """
    length, block, parts = q.shape[1], _BLOCK, []
    if length > block:
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    for start in range(0, length, block):
        first, stop = 0 if window is None else max(0, start - window + 1), min(start + block, length)
        queries, keys = slice(start, stop), slice(first, stop)
        rows, columns = jnp.arange(start, stop)[:, None], jnp.arange(first, stop)
        mask = (columns <= rows if window is None else (columns <= rows) & (columns > rows - window))[None]
        if segment_ids is not None:
            mask = mask & _same_segment(segment_ids, shared, queries, keys)
        parts.append(_grouped(q[:, queries], _heads_first(k[:, keys], v[:, keys]), mask, None, scale, cap))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _same_segment(segment_ids: Array, shared: int, queries: slice, keys: slice) -> Array:
    """Return bool `[b, queries, keys]`: whether a key is of the query's segment or one of the `shared` first tokens."""
    own, others = segment_ids[:, queries, None], segment_ids[:, None, keys]
    same = own == others
    same = same | (jnp.arange(segment_ids.shape[1])[keys] < shared) if shared else same
    return same & (others > 0)


def with_prefix(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t kv_heads d"],
    v: Float[Array, "b t kv_heads d"],
    prefix: tuple[Float[Array, "n kv_heads d"], Float[Array, "n kv_heads d"]],
) -> tuple[Float[Array, "b n+t heads d"], Float[Array, "b n+t kv_heads d"], Float[Array, "b n+t kv_heads d"]]:
    """Return (q, k, v) for `causal_attention` with n more keys and values before the others, which all tokens attend to.

    n queries of zeros are added as well, so that the mask remains the causal one, which every kernel has. The wanted results
    are the last t of the n + t results.

    Args:
        q: `[b, t, heads, d]`.
        k: `[b, t, kv_heads, d]`.
        v: `[b, t, kv_heads, d]`.
        prefix: (keys, values), each `[n, kv_heads, d]`.
    """
    keys, values = (jnp.broadcast_to(x.astype(k.dtype), (k.shape[0], *x.shape)) for x in prefix)
    queries = jnp.zeros((q.shape[0], keys.shape[1], *q.shape[2:]), q.dtype)
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((queries, q), (keys, k), (values, v)))
    return q, k, v


def biased_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b s kv_heads d"],
    v: Float[Array, "b s kv_heads d"],
    mask: Bool[Array, "#b #t s"],
    bias: Float32[Array, "heads t s"] | None,
    *,
    scale: float,
) -> Float[Array, "b t heads d"]:
    """Compute attention with a bias on the scores, by XLA; the result is `[b, t, heads, d]`.

    Args:
        q: `[b, t, heads, d]`.
        k: `[b, s, kv_heads, d]`.
        v: `[b, s, kv_heads, d]`.
        mask: bool `[b or 1, t or 1, s]`, true where a query may attend to a key.
        bias: float32 `[heads, t, s]`, added to the scaled scores; it gets no gradient. None: no bias.
        scale: factor on the scores q·k.
    """

    def attend(q: Array, k: Array, v: Array, bias: Array | None, mask: Array) -> Array:
        return _grouped(q, _heads_first(k, v), mask, bias, scale, None)

    return over_heads(attend, (q, 2), (k, 2), (v, 2), (bias, 0), rows=mask)


def relative_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b s kv_heads d"],
    v: Float[Array, "b s kv_heads d"],
    keys: Bool[Array, "#b s"],
    distance_bias: Float32[Array, "heads distances"] | None,
    *,
    scale: float,
    before: int | None = None,
    target: AttentionTarget = CPU,
) -> Float[Array, "b t heads d"]:
    """Compute attention whose bias depends on distances alone, by XLA, in memory that is linear in t and s.

    Args:
        q: `[b, t, heads, d]`.
        k: `[b, s, kv_heads, d]`.
        v: `[b, s, kv_heads, d]`.
        keys: bool `[b or 1, s]`, true for keys that queries may attend to.
        distance_bias: float32 `[heads, t + s - 1]`, added to the scaled scores: the value of key j for query i is at
            j - i + t - 1. It gets no gradient. None: no bias.
        scale: factor on the scores q·k.
        before: number of keys before that of the first query, if queries attend to no later keys; None: to all keys.
        target: the device that the program is compiled for.

    Returns:
        `[b, t, heads, d]` in the dtype of q.
    """
    (t, s), visible = (q.shape[1], k.shape[1]), KeyRows(before)

    def attend(q: Array, k: Array, v: Array, distance_bias: Array | None, keys: Array) -> Array:
        if max(t, s) > _LONGEST:
            mask, tile = Mask(visible, keys), largest_tile(target)
            return tiled_attention(q, k, v, mask, scale=scale, largest_tile=tile, distance_bias=distance_bias)
        bias = None if distance_bias is None else diagonals(distance_bias, t, s)
        return _grouped(q, _heads_first(k, v), visible.mask(keys, jnp.arange(t), jnp.arange(s)), bias, scale, None)

    return over_heads(attend, (q, 2), (k, 2), (v, 2), (distance_bias, 0), rows=keys)


def cached_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b kv_heads s d"],
    v: Float[Array, "b kv_heads s d"],
    mask_of: Callable[[Array], Array],
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "b t heads d"]:
    """Compute the attention of new tokens to cached keys and values, by XLA; the result is `[b, t, heads, d]`.

    Only the scores of 512 queries are in memory at a time.

    Args:
        q: `[b, t, heads, d]`.
        k: `[b, kv_heads, s, d]`.
        v: `[b, kv_heads, s, d]`.
        mask_of: returns, for the queries with the numbers `[n]`, the mask bool `[b, n, s]`, true where a query may attend
            to a key. The whole mask is never stored.
        scale: factor on the scores q·k; None: d ** -0.5.
        cap: scores become cap * tanh(score / cap); None: no cap.
    """
    (b, t), scale = q.shape[:2], float(q.shape[-1] ** -0.5 if scale is None else scale)

    def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
        return _grouped(q, (k, v), mask, None, scale, cap)

    def attend_block(block: tuple[Array, Array]) -> Array:
        return over_heads(attend, (block[0], 2), (k, 1), (v, 1), rows=mask_of(block[1]))

    if t <= QUERIES_AT_ONCE:
        return attend_block((q, jnp.arange(t)))
    count = -(-t // QUERIES_AT_ONCE)
    padded = jnp.pad(q, ((0, 0), (0, count * QUERIES_AT_ONCE - t), (0, 0), (0, 0)))
    blocks = padded.reshape(b, count, QUERIES_AT_ONCE, *q.shape[2:]).swapaxes(0, 1)
    # The numbers of padded queries are that of the last query, so that they are in the mask.
    numbers = jnp.minimum(jnp.arange(count * QUERIES_AT_ONCE), t - 1).reshape(count, -1)
    return jax.lax.map(attend_block, (blocks, numbers)).swapaxes(0, 1).reshape(padded.shape)[:, :t]


def _heads_first(k: Array, v: Array) -> tuple[Array, Array]:
    return k.swapaxes(1, 2), v.swapaxes(1, 2)


def _grouped(q: Array, kv: tuple[Array, Array], mask: Array, bias: Array | None, scale: float, cap: float | None) -> Array:
    """Compute attention with XLA, with the queries of all heads that share a key head in one matrix.

    q `[b, t, heads, d]`, kv `[b, kv_heads, s, d]`, mask bool `[b or 1, t or 1, s]`, bias `[heads, t, s]` or None.

    All products are then plain batched ones, which XLA's CPU backend runs three times faster than those of the
    `[b, t, heads, d]` layout of `jax.nn.dot_product_attention`.
    """
    (b, t, heads, d), (kv_heads, s) = q.shape, kv[0].shape[1:3]
    group = heads // kv_heads
    q = q.reshape(b, t, kv_heads, group, d).transpose(0, 2, 3, 1, 4).reshape(b * kv_heads, group * t, d)
    k, v = (x.reshape(b * kv_heads, s, d) for x in kv)
    if mask.shape[0] > 1:
        mask = jnp.repeat(mask, kv_heads, axis=0)
    if mask.shape[1] > 1:
        mask = jnp.tile(mask, (1, group, 1))
    bias = None if bias is None else bias.reshape(kv_heads, group * t, s)
    out: Array = _attend(q, k, v, mask, bias, scale, cap)  # pyright: ignore[reportAssignmentType]
    return out.reshape(b, kv_heads, group, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, d)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q: Array, k: Array, v: Array, mask: Array, bias: Array | None, scale: float, cap: float | None) -> Array:
    """Return softmax(scale q kᵀ + bias) v for q `[n, t, d]`, k and v `[n, s, d]`, mask bool `[n or 1, t or 1, s]`.

    `cap` is applied to the scores before the bias. The bias `[m, t, s]` is repeated along n and gets no gradient. The
    products are computed in the dtype of q; the gradients of k and v have the dtypes of k and v, which are float32 if the
    caller sums several of them.

    The backward pass is that of FlashAttention (Dao et al. 2022, section B.2): it recomputes the attention weights from the
    logarithm of the softmax's normalizer without a reduction, and the reduction in their gradient is a sum over d, not over
    s.
    """
    return _attend_forward(q, k, v, mask, bias, scale, cap)[0]


def _scores(q: Array, k: Array, scale: float, cap: float | None) -> Array:
    scores = einsum("ntd,nsd->nts", q, k, jnp.float32) * scale
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _masked(scores: Array, mask: Array, bias: Array | None) -> Array:
    if bias is not None:  # broadcast in the addition, so that the repeated bias is never stored
        scores = (scores.reshape(-1, *bias.shape) + bias).reshape(scores.shape)
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def _attend_forward(
    q: Array, k: Array, v: Array, mask: Array, bias: Array | None, scale: float, cap: float | None
) -> tuple[Array, Any]:
    like_k = k[:0]  # an empty array with the dtype of the gradients of k and v; k and v are saved in the dtype of q
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scores = _masked(_scores(q, k, scale, cap), mask, bias)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    normalizer = jnp.sum(weights, axis=-1, keepdims=True)
    out = einsum("nts,nsd->ntd", weights.astype(v.dtype), v) / normalizer.astype(v.dtype)
    out = name_in_rule(out, "attention")
    return out, (q, k, v, like_k, mask, bias, out, name_in_rule(highest + jnp.log(normalizer), "attention"))


def _attend_backward(
    scale: float, cap: float | None, residuals: Any, gradient: Array
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, like_k, mask, bias, out, log_normalizer = residuals
    scores = _scores(q, k, scale, cap)
    weights = jnp.exp(_masked(scores, mask, bias) - log_normalizer)
    dv = einsum("nts,ntd->nsd", weights.astype(v.dtype), gradient, like_k.dtype)
    dweights = einsum("ntd,nsd->nts", gradient, v, jnp.float32)
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = weights * (dweights - delta) * scale
    if cap is not None:  # tanh' = 1 - tanh²
        dscores = dscores * (1 - (scores / cap) ** 2)
    dscores = dscores.astype(q.dtype)
    dk = einsum("nts,ntd->nsd", dscores, q, like_k.dtype)
    return einsum("nts,nsd->ntd", dscores, k), dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
