"""Cross-entropy over a large vocabulary that never holds all logits.

The head's logits of 8192 tokens over 128,000 words are 4 GiB in float32, twice that with their gradient. So the tokens go
through the head in chunks, and the gradient with respect to the hidden states is computed in the same pass, while a chunk's
logits exist:

    logits = h Wᵀ        loss = w (logsumexp(logits) - h·W[target])        dh = w (softmax(logits) - e[target]) W

This takes two matrix products a chunk instead of the three of a recomputing backward pass; the saved residual is dh, which
is as large as h. The head is frozen: no gradient of it is formed. Where an adapter trains changes of the head
(nn.embedding), the backward pass computes the logits once more.

Each chunk reads the whole head twice. The size of a chunk is therefore the number of tokens whose logits take a fixed amount
of memory, and never small (`chunk_tokens`). On a CPU it is smaller, so that the logits stay in the cache; multiplying takes
many times longer there than reading the head.

On several devices each device holds its rows of the head (over the axes `fsdp` and `tensor`), and computes the logits of
these rows alone for a chunk of the tokens of all devices that share the head:

    h of all devices  →  own logits  →  maximum, sum of exponentials, own target's logit: reduced over devices
    dh = Σ over devices of (share of own rows) (own rows)

The hidden states travel between devices, some megabytes a chunk. The head, a gigabyte, does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlora_jax.errors import UnsupportedError
from qlora_jax.nn import VocabularyMatrix
from qlora_jax.nn.mesh import ROWS
from qlora_jax.quant import by_platform

LOGITS = 2**27  # bytes that the float32 logits of a chunk take, about
LEAST = 512  # tokens of a chunk: with fewer, reading the head takes longer than multiplying with it
Axes = tuple[str, ...] | None
CPU_SHARE = 4  # on a CPU both are divided by this


def chunk_tokens(rows: int, *, cpu: bool = False) -> int:
    """Return the tokens of a chunk for a head of `rows` rows: a power of two, which divides most batches."""
    less = CPU_SHARE if cpu else 1
    return max(2 ** round(math.log2(LOGITS / (less * 4 * rows))), LEAST // less)


def chunked_cross_entropy(
    hidden: Float[Array, "n d"],
    head: Float[Array, "v d"] | VocabularyMatrix,
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    chunk: int | None = None,
    cap: float | None = None,
) -> Float[Array, ""]:
    """Return the weighted sum of the cross-entropies, float32; see `token_losses` for the arguments."""
    return token_losses(hidden, head, targets, weights, chunk, cap).sum()


def token_losses(
    hidden: Float[Array, "n d"],
    head: Float[Array, "v d"] | VocabularyMatrix,
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    chunk: int | None = None,
    cap: float | None = None,
    axes: Axes = None,
) -> Float[Array, " n"]:
    """Return the weighted cross-entropy of each token, float32.

    Args:
        hidden: the hidden states after the last norm.
        head: the output head, dense or packed. Of its parts only the trainable changes, if it has any, get a gradient.
        targets: the token to predict at each place.
        weights: the factor on each loss, float32; 0 for tokens that are not learned.
        chunk: how many of this device's tokens have their logits in memory at a time; None: by the rows of the head and the
            platform.
        cap: logits are cap * tanh(products / cap); None: the products themselves.
        axes: the mesh axes over which the rows of the head are spread, for calls inside `jax.shard_map`; the tokens are
            spread over those of them that are in `ROWS`, too. None: the head is whole.

    Raises:
        UnsupportedError: the rows of a head with a trainable change are spread.
    """
    table = head if isinstance(head, VocabularyMatrix) else VocabularyMatrix(head)
    changes = (table.delta, table.low_rank)
    if axes is not None and jax.tree.leaves(changes):
        raise UnsupportedError("token_losses: expected a head without a delta where its rows are spread, found one")
    settings = _Settings(table.rows, chunk, cap, axes)
    losses: Any = _token_losses(hidden, table.weight, changes, targets, weights, settings)
    return losses


def token_losses_and_hits(
    hidden: Float[Array, "n d"],
    head: VocabularyMatrix,
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    cap: float | None = None,
    axes: Axes = None,
) -> Float[Array, "n 2"]:
    """Return for each token its weighted loss, and its weight where its target has the highest of all logits, else 0.

    The result is not to be differentiated. See `token_losses` for the arguments.
    """

    def of_chunks(chunk: int, head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array) -> Array:
        def run(part: tuple[Array, Array, Array]) -> Array:
            h, target, weight = _gathered(axes, *part)
            losses, logits, _ = _chunk_loss(head, h, target, weight, cap, axes)
            own, here = _own_rows(head, target, axes)
            label = jnp.take_along_axis(logits, jnp.minimum(own, logits.shape[1] - 1)[:, None], axis=1)[:, 0]
            highest = logits.max(-1) if axes is None else jax.lax.pmax(logits.max(-1), axes)
            hits = here & (label >= highest)
            if axes is not None:
                hits = jax.lax.psum(hits.astype(jnp.float32), axes) > 0
            return jnp.stack([_own(axes, losses), _own(axes, jnp.where(hits, weight, 0))])

        found = jax.lax.map(run, _chunks(chunk, hidden, targets, weights))
        return found.transpose(0, 2, 1).reshape(-1, 2)[: hidden.shape[0]]

    return _with_chunk(of_chunks, None, axes, head.with_delta(), hidden, targets, weights)


@dataclass(frozen=True)
class _Settings:
    """The static arguments of `token_losses`; `rows` are those of the head that its delta changes."""

    rows: tuple[int, ...] | None
    chunk: int | None
    cap: float | None
    axes: Axes


Changes = tuple[Array | None, tuple[Array, Array] | None]  # the delta and the change of low rank of a head


def _head(weight: Any, changes: Changes, settings: _Settings) -> VocabularyMatrix:
    return VocabularyMatrix(weight, changes[0], settings.rows, changes[1])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _token_losses(
    hidden: Array, weight: Any, changes: Changes, targets: Array, weights: Array, settings: _Settings
) -> Array:
    cap, axes = settings.cap, settings.axes

    def losses(chunk: int, head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array) -> Array:
        def run(part: tuple[Array, Array, Array]) -> Array:
            h, target, weight = _gathered(axes, *part)
            return _own(axes, _chunk_loss(head, h, target, weight, cap, axes)[0])

        return jax.lax.map(run, _chunks(chunk, hidden, targets, weights)).reshape(-1)[: hidden.shape[0]]

    head = _head(weight, changes, settings).with_delta()
    return _with_chunk(losses, settings.chunk, axes, head, hidden, targets, weights)


def _forward(
    hidden: Array, weight: Any, changes: Changes, targets: Array, weights: Array, settings: _Settings
) -> tuple[Array, Any]:
    if not jax.tree.leaves(changes):
        losses, gradient, _ = _losses_and_gradients(VocabularyMatrix(weight), hidden, targets, weights, settings)
        return losses, gradient
    # The gradient of the head sums over tokens, whose own factors are known only in the backward pass.
    losses: Any = _token_losses(hidden, weight, changes, targets, weights, settings)
    return losses, (hidden, weight, changes, targets, weights)


def _backward(settings: _Settings, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    if not isinstance(residuals, tuple):
        return (residuals * cotangent[:, None]).astype(residuals.dtype), None, None, None, None
    hidden, weight, changes, targets, weights = residuals
    head = _head(weight, changes, settings)
    _, of_hidden, of_changes = _losses_and_gradients(head, hidden, targets, weights * cotangent, settings)
    return of_hidden, None, of_changes, None, None


_token_losses.defvjp(_forward, _backward)


def _losses_and_gradients(
    table: VocabularyMatrix, hidden: Array, targets: Array, weights: Array, settings: _Settings
) -> tuple[Array, Array, Changes]:
    """Return the losses `[n]`, and the gradients of their sum with respect to the hidden states and the head's changes."""
    cap, axes = settings.cap, settings.axes

    def of_chunks(chunk: int, table: VocabularyMatrix, hidden: Array, targets: Array, weights: Array) -> tuple[Any, ...]:
        head = table.with_delta()

        def run(sums: Any, part: tuple[Array, Array, Array]) -> tuple[Any, tuple[Array, Array]]:
            h, target, weight = _gathered(axes, *part)
            losses, logits, log_normalizer = _chunk_loss(head, h, target, weight, cap, axes)
            # The 1 of the target is subtracted in float32: for a confident token nothing of the difference would survive
            # bfloat16.
            own, _ = _own_rows(head, target, axes)
            share = jnp.exp(logits - log_normalizer[:, None]).at[jnp.arange(target.size), own].add(-1.0, mode="drop")
            if cap is not None:  # tanh' = 1 - tanh²
                share = share * (1 - (logits / cap) ** 2)
            share = (share * weight[:, None]).astype(h.dtype)
            of_hidden = _summed(axes, share, head)
            sums = jax.tree.map(jnp.add, sums, _of_changes(table, share, h))
            return sums, (_own(axes, losses), of_hidden)

        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (table.delta, table.low_rank))
        chunks: Any = _chunks(chunk, hidden, targets, weights)
        of_changes, (losses, gradients) = jax.lax.scan(run, start, chunks)
        count, features = hidden.shape
        return losses.reshape(-1)[:count], gradients.reshape(-1, features)[:count], of_changes

    losses, of_hidden, of_changes = _with_chunk(of_chunks, settings.chunk, axes, table, hidden, targets, weights)
    return losses, of_hidden, of_changes


def _of_changes(table: VocabularyMatrix, share: Array, h: Array) -> Changes:
    """Return the gradients of a chunk's losses with respect to the head's changes, float32.

    Args:
        share: the gradients with respect to the logits, `[n, vocabulary]`.
        h: the hidden states, `[n, features]`.
    """
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    of_delta = of_low_rank = None
    if table.delta is not None:
        trained = share if table.rows is None else share[:, jnp.asarray(table.rows)]
        of_delta = product("nr,nd->rd", trained, h)
    if table.low_rank is not None:
        down, up = (part.astype(h.dtype) for part in table.low_rank)
        inner = product("nv,rv->nr", share, up).astype(h.dtype)
        of_low_rank = product("nd,nr->dr", h, inner), product("nr,nv->rv", (h @ down), share)
    return of_delta, of_low_rank


def _with_chunk(run: Callable[..., Any], chunk: int | None, axes: Axes, head: VocabularyMatrix, *arrays: Array) -> Any:
    """Return `run(chunk, head, *arrays)`, with the chunk of the platform if `chunk` is None.

    A head whose rows are spread over devices always takes the larger chunk, which the devices share.
    """
    if chunk is not None:
        return run(chunk, head, *arrays)
    rows = head.shape[0]
    if axes is not None:
        return run(chunk_tokens(rows) // jax.lax.axis_size(_of_tokens(axes)), head, *arrays)
    on_cpu, elsewhere = partial(run, chunk_tokens(rows, cpu=True)), partial(run, chunk_tokens(rows))
    return by_platform(head, *arrays, cpu=on_cpu, default=elsewhere)


def _chunk_loss(
    head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array, cap: float | None, axes: Axes
) -> tuple[Array, Array, Array]:
    """Return (weighted losses, float32 logits of this device's rows, logsumexp of all logits) of one chunk."""
    logits = _capped(head.logits(hidden, jnp.float32), cap)
    log_normalizer = _logsumexp(logits, axes)
    rows, here = _own_rows(head, targets, axes)
    label_logit = jnp.einsum("nd,nd->n", hidden, head(rows).astype(hidden.dtype), preferred_element_type=jnp.float32)
    if axes is not None:
        label_logit = jax.lax.psum(jnp.where(here, label_logit, 0), axes)
    return weights * (log_normalizer - _capped(label_logit, cap)), logits, log_normalizer


def _own_rows(head: VocabularyMatrix, tokens: Array, axes: Axes) -> tuple[Array, Array]:
    """Return (the tokens' rows in this device's part of the head, which tokens have a row there).

    The row of a token that belongs to another device is the number of rows, which is beyond the end.
    """
    count = head.shape[0]
    first = 0 if axes is None else jax.lax.axis_index(axes) * count
    here = (tokens >= first) & (tokens < first + count)
    return jnp.where(here, tokens - first, count), here


def _logsumexp(logits: Array, axes: Axes) -> Array:
    if axes is None:
        return jax.nn.logsumexp(logits, axis=-1)
    highest = jax.lax.pmax(logits.max(-1), axes)
    return highest + jnp.log(jax.lax.psum(jnp.exp(logits - highest[:, None]).sum(-1), axes))


def _summed(axes: Axes, share: Array, head: VocabularyMatrix) -> Array:
    """Return share @ head; on several devices the sum of all devices' products, for this device's own tokens."""
    if axes is None:
        return head.weighted_sums(share)
    own = jax.lax.psum_scatter(head.weighted_sums(share, jnp.float32), _of_tokens(axes), tiled=True)
    others = tuple(axis for axis in axes if axis not in ROWS)
    return jax.lax.psum(own, others).astype(share.dtype)


def _gathered(axes: Axes, *arrays: Array) -> tuple[Array, ...]:
    """Return the arrays with the rows of all devices."""
    if axes is None:
        return arrays
    return tuple(jax.lax.all_gather(array, _of_tokens(axes), tiled=True) for array in arrays)


def _own(axes: Axes, array: Array) -> Array:
    """Return this device's rows of an array that holds the rows of all devices."""
    if axes is None:
        return array
    shared = _of_tokens(axes)
    count = array.shape[0] // jax.lax.axis_size(shared)
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(shared) * count, count)


def _of_tokens(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes over which not only the rows of the head are spread but the tokens too."""
    return tuple(axis for axis in axes if axis in ROWS)


def _capped(logits: Array, cap: float | None) -> Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Return each `[n, …]` array as `[n / chunk, chunk, …]`, padded with zeros (whose weight is 0)."""
    size = min(chunk, arrays[0].shape[0])

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, -array.shape[0] % size)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(-1, size, *array.shape[1:])

    return tuple(split(array) for array in arrays)
