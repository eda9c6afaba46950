"""Cross-entropy over a large vocabulary that never holds all logits.

The head's logits of 8192 tokens over 128,000 words are 4 GiB in float32, twice that with their gradient. So the tokens go
through the head in chunks, and the gradient with respect to the hidden states is made in the same pass, while a chunk's
logits exist:

    logits = h Wᵀ        loss = w (logsumexp(logits) - h·W[target])        dh = w (softmax(logits) - e[target]) W

Two products a chunk instead of the three of a recomputing backward pass; what is kept is dh, as large as h. The head is
frozen: no gradient of it is formed. Where an adapter trains a change of the head (nn.embedding), the logits are made anew on
the way back.

Each chunk reads the whole head twice, so it is as large as a fixed amount of memory for its logits allows, and never small
(`chunk_tokens`). On a CPU it is smaller: its logits stay in the cache, and many times as long is spent multiplying.

On several devices each holds its rows of the head, and for a chunk of every device's tokens the logits of these rows alone:

    h of all devices  →  own logits  →  maximum, sum of exponentials, own target's logit: reduced over devices
    dh = Σ over devices of (share of own rows) (own rows)

The hidden states travel, some megabytes a chunk, and not the head, a gigabyte that would lie whole on each device.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.nn import VocabularyMatrix
from qlora_jax.nn.parallel import AXIS, devices_of_context, over_rows

LOGITS = 2**27  # bytes that the float32 logits of a chunk are to take, about
LEAST = 512  # tokens of a chunk: with fewer, reading the head takes longer than multiplying with it
CPU_SHARE = 4  # a CPU takes so many times less of both


def chunk_tokens(rows: int, *, cpu: bool = False) -> int:
    """Tokens of a chunk for a head of so many rows: a power of two, which divides most batches."""
    less = CPU_SHARE if cpu else 1
    return max(2 ** round(math.log2(LOGITS / (less * 4 * rows))), LEAST // less)


def chunked_cross_entropy(
    hidden: Array,
    head: Array | VocabularyMatrix,
    targets: Array,
    weights: Array,
    chunk: int | None = None,
    cap: float | None = None,
) -> Array:
    """The weighted sum of the cross-entropies, float32 scalar; see `token_losses`."""
    return token_losses(hidden, head, targets, weights, chunk, cap).sum()


def token_losses(
    hidden: Array,
    head: Array | VocabularyMatrix,
    targets: Array,
    weights: Array,
    chunk: int | None = None,
    cap: float | None = None,
    axis: str | None = None,
) -> Array:
    """The weighted cross-entropy of each token, float32 `[n]`.

    Args:
        hidden: `[n, d]`; head: `[vocabulary, d]`, dense or packed; only its delta, if any, is no constant to
            differentiation.
        targets: int32 `[n]`; weights: float32 `[n]`, 0 for tokens that are not learned.
        chunk: of this device's tokens, whose logits exist at a time; by the rows of the head and the platform if None.
        cap: logits are cap * tanh(products / cap); None: the products.
        axis: of a mesh, over whose devices the rows of the head, which has no delta then, and the tokens are spread, in a
            function that each of them runs (`jax.shard_map`); None: the head is whole.
    """
    table = head if isinstance(head, VocabularyMatrix) else VocabularyMatrix(head)
    if axis is not None and table.delta is not None:
        raise ValueError("token_losses: expected a head without a delta where its rows are spread, found one")
    losses: Any = _token_losses(hidden, table.weight, table.delta, targets, weights, table.rows, chunk, cap, axis)
    return losses


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _token_losses(
    hidden: Array,
    weight: Any,
    delta: Array | None,
    targets: Array,
    weights: Array,
    rows: tuple[int, ...] | None,
    chunk: int | None,
    cap: float | None,
    axis: str | None,
) -> Array:
    def losses(chunk: int, head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array) -> Array:
        def run(part: tuple[Array, Array, Array]) -> Array:
            h, target, weight = _gathered(axis, *part)
            return _own(axis, _chunk_loss(head, h, target, weight, cap, axis)[0])

        return jax.lax.map(run, _chunks(chunk, hidden, targets, weights)).reshape(-1)[: hidden.shape[0]]

    return _with_chunk(losses, chunk, axis, VocabularyMatrix(weight, delta, rows).with_delta(), hidden, targets, weights)


def _forward(
    hidden: Array,
    weight: Any,
    delta: Array | None,
    targets: Array,
    weights: Array,
    rows: tuple[int, ...] | None,
    chunk: int | None,
    cap: float | None,
    axis: str | None,
) -> tuple[Array, Any]:
    if delta is None:
        losses, gradient, _ = _losses_and_gradients(VocabularyMatrix(weight), hidden, targets, weights, chunk, cap, axis)
        return losses, gradient
    # The gradient of the head sums over tokens, whose own factors are known only on the way back.
    losses: Any = _token_losses(hidden, weight, delta, targets, weights, rows, chunk, cap, axis)
    return losses, (hidden, weight, delta, targets, weights)


def _backward(
    rows: tuple[int, ...] | None, chunk: int | None, cap: float | None, axis: str | None, kept: Any, cotangent: Array
) -> tuple[Any, ...]:
    if not isinstance(kept, tuple):
        return (kept * cotangent[:, None]).astype(kept.dtype), None, None, None, None
    hidden, weight, delta, targets, weights = kept
    head = VocabularyMatrix(weight, delta, rows)
    _, of_hidden, of_delta = _losses_and_gradients(head, hidden, targets, weights * cotangent, chunk, cap, axis)
    return of_hidden, None, of_delta, None, None


_token_losses.defvjp(_forward, _backward)


def _losses_and_gradients(
    table: VocabularyMatrix, hidden: Array, targets: Array, weights: Array, chunk: int | None, cap: float | None, axis: Any
) -> tuple[Array, Array, Array | None]:
    """The losses `[n]`, and the gradients of their sum with respect to the hidden states and to the table's delta."""

    def of_chunks(chunk: int, table: VocabularyMatrix, hidden: Array, targets: Array, weights: Array) -> tuple[Any, ...]:
        head, rows = table.with_delta(), None if table.rows is None else jnp.asarray(table.rows)

        def run(of_delta: Array | None, part: tuple[Array, Array, Array]) -> tuple[Array | None, tuple[Array, Array]]:
            h, target, weight = _gathered(axis, *part)
            losses, logits, log_normalizer = _chunk_loss(head, h, target, weight, cap, axis)
            # The 1 of the target goes off in float32: for a confident token nothing of the difference would survive
            # bfloat16.
            own, _ = _own_rows(head, target, axis)
            share = jnp.exp(logits - log_normalizer[:, None]).at[jnp.arange(target.size), own].add(-1.0, mode="drop")
            if cap is not None:  # tanh' = 1 - tanh²
                share = share * (1 - (logits / cap) ** 2)
            share = (share * weight[:, None]).astype(h.dtype)
            of_hidden = _summed(axis, share, head)
            if of_delta is not None:
                trained = share if rows is None else share[:, rows]
                of_delta = of_delta + jnp.einsum("nr,nd->rd", trained, h, preferred_element_type=jnp.float32)
            return of_delta, (_own(axis, losses), of_hidden)

        start = None if table.delta is None else jnp.zeros(table.delta.shape, jnp.float32)
        chunks: Any = _chunks(chunk, hidden, targets, weights)
        of_delta, (losses, gradients) = jax.lax.scan(run, start, chunks)
        count, features = hidden.shape
        return losses.reshape(-1)[:count], gradients.reshape(-1, features)[:count], of_delta

    losses, of_hidden, of_delta = _with_chunk(of_chunks, chunk, axis, table, hidden, targets, weights)
    return losses, of_hidden, of_delta


def _with_chunk(run: Callable[..., Any], chunk: int | None, axis: str | None, head: VocabularyMatrix, *arrays: Array) -> Any:
    """`run(chunk, head, *arrays)`; where the chunk is None with that of the platform, for a head that is spread over devices
    always the larger one, which they share."""
    if chunk is not None:
        return run(chunk, head, *arrays)
    rows = head.shape[0]
    if axis is not None:
        return run(chunk_tokens(rows) // jax.lax.axis_size(axis), head, *arrays)
    on_cpu, elsewhere = partial(run, chunk_tokens(rows, cpu=True)), partial(run, chunk_tokens(rows))
    return jax.lax.platform_dependent(head, *arrays, cpu=on_cpu, default=elsewhere)


def _chunk_loss(
    head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array, cap: float | None, axis: str | None
) -> tuple[Array, Array, Array]:
    """(weighted losses, float32 logits, their logsumexp) of one chunk; the logits are those of this device's rows."""
    logits = _capped(head.logits(hidden, jnp.float32), cap)
    log_normalizer = _logsumexp(logits, axis)
    rows, here = _own_rows(head, targets, axis)
    label_logit = jnp.einsum("nd,nd->n", hidden, head(rows).astype(hidden.dtype), preferred_element_type=jnp.float32)
    if axis is not None:
        label_logit = jax.lax.psum(jnp.where(here, label_logit, 0), axis)
    return weights * (log_normalizer - _capped(label_logit, cap)), logits, log_normalizer


def _own_rows(head: VocabularyMatrix, tokens: Array, axis: str | None) -> tuple[Array, Array]:
    """(the numbers of tokens' rows in this device's part of the head, beyond its end for others; which have one here)."""
    count = head.shape[0]
    first = 0 if axis is None else jax.lax.axis_index(axis) * count
    here = (tokens >= first) & (tokens < first + count)
    return jnp.where(here, tokens - first, count), here


def _logsumexp(logits: Array, axis: str | None) -> Array:
    if axis is None:
        return jax.nn.logsumexp(logits, axis=-1)
    highest = jax.lax.pmax(logits.max(-1), axis)
    return highest + jnp.log(jax.lax.psum(jnp.exp(logits - highest[:, None]).sum(-1), axis))


def _summed(axis: str | None, share: Array, head: VocabularyMatrix) -> Array:
    """share @ head: on several devices the sum of their products, each device's own tokens of it."""
    if axis is None:
        return head.weighted_sums(share)
    return jax.lax.psum_scatter(head.weighted_sums(share, jnp.float32), axis, tiled=True).astype(share.dtype)


def _gathered(axis: str | None, *arrays: Array) -> tuple[Array, ...]:
    """The rows of all devices."""
    return arrays if axis is None else tuple(jax.lax.all_gather(array, axis, tiled=True) for array in arrays)


def _own(axis: str | None, array: Array) -> Array:
    """This device's rows of an array that holds those of all."""
    if axis is None:
        return array
    count = array.shape[0] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(axis) * count, count)


def _capped(logits: Array, cap: float | None) -> Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Each `[n, …]` array as `[n / chunk, chunk, …]`, filled up with zeros (of weight 0)."""
    size = min(chunk, arrays[0].shape[0])

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, -array.shape[0] % size)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(-1, size, *array.shape[1:])

    return tuple(split(array) for array in arrays)


def language_model_loss(
    model: Any,
    batch: Mapping[str, Array],
    key: Array | None,
    *,
    neftune_alpha: float = 0.0,
    attention_groups: int = 1,
) -> Array:
    """The summed cross-entropy of a batch over its learned tokens, float32 scalar.

    Args:
        model: anything with `hidden(tokens, positions=, segment_ids=, key=)`, `head` and `logit_cap`.
        batch: `inputs`, `targets`, `loss_mask`, each `[b, t]`; `positions` and `segment_ids` where documents are packed.
        key: random key of dropout and NEFTune; None turns both off.
        neftune_alpha: noise on the embeddings, for models whose `hidden` takes that argument; 0 for none.
        attention_groups: of LongLoRA's attention, for models whose `hidden` takes that argument; 1 for dense attention.
    """
    more: dict[str, Any] = {"neftune_alpha": neftune_alpha} if neftune_alpha else {}
    more |= {"attention_groups": attention_groups} if attention_groups > 1 else {}
    hidden = model.hidden(
        batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids"), key=key, **more
    )
    return row_losses(model, hidden, batch["targets"], batch["loss_mask"]).sum()


def seq2seq_loss(model: Any, batch: Mapping[str, Array], key: Array | None) -> Array:
    """`language_model_loss` of an encoder-decoder.

    Args:
        model: anything with `encode(sources, source_mask, key=)`, `hidden(inputs, encoded, source_mask, key=)`, `head` and
            `logit_cap`.
        batch: `sources` and `source_mask` `[b, s]`; `inputs` (the targets shifted right), `targets`, `loss_mask` `[b, t]`.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    encoded = model.encode(batch["sources"], batch["source_mask"], key=keys[0])
    hidden = model.hidden(batch["inputs"], encoded, batch["source_mask"], key=keys[1])
    return row_losses(model, hidden, batch["targets"], batch["loss_mask"]).sum()


def language_model_metrics(model: Any, batch: Mapping[str, Array], key: Array | None) -> tuple[Array, dict[str, Array]]:
    """`language_model_loss` of held-out data, and over its learned tokens the sum of what TRL calls `mean_token_accuracy`: 1
    for a token to which the model gives the highest of all logits."""
    hidden = model.hidden(batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids"), key=key)
    return _figures(model, hidden, batch)


def seq2seq_metrics(model: Any, batch: Mapping[str, Array], key: Array | None) -> tuple[Array, dict[str, Array]]:
    """`seq2seq_loss` with the same figure."""
    encoded = model.encode(batch["sources"], batch["source_mask"], key=None)
    return _figures(model, model.hidden(batch["inputs"], encoded, batch["source_mask"], key=None), batch)


def _figures(model: Any, hidden: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """(summed loss, other sums); not to be differentiated."""

    def figures(head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array, axis: str | None) -> Array:
        def of_chunks(chunk: int, head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array) -> Array:
            def run(part: tuple[Array, Array, Array]) -> Array:
                h, target, weight = _gathered(axis, *part)
                losses, logits, _ = _chunk_loss(head, h, target, weight, model.logit_cap, axis)
                own, here = _own_rows(head, target, axis)
                label = jnp.take_along_axis(logits, jnp.minimum(own, logits.shape[1] - 1)[:, None], axis=1)[:, 0]
                highest = logits.max(-1) if axis is None else jax.lax.pmax(logits.max(-1), axis)
                hits = here & (label >= highest)
                if axis is not None:
                    hits = jax.lax.psum(hits.astype(jnp.float32), axis) > 0
                return jnp.stack([_own(axis, losses), _own(axis, jnp.where(hits, weight, 0))])

            found = jax.lax.map(run, _chunks(chunk, hidden, targets, weights))
            return found.transpose(0, 2, 1).reshape(-1, 2)[: hidden.shape[0]]

        flat = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1))
        return _with_chunk(of_chunks, None, axis, head.with_delta(), *flat).reshape(*targets.shape, 2).sum(1)

    sums = _over_rows_with_head(model.head, figures, hidden, batch["targets"], batch["loss_mask"]).sum(0)
    return sums[0], {"mean_token_accuracy": sums[1]}


def row_losses(model: Any, hidden: Array, targets: Array, weights: Array) -> Array:
    """The weighted cross-entropy of each row, summed over its tokens: `[b, t, d]` hidden states to float32 `[b]`."""

    def losses(head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array, axis: str | None) -> Array:
        flat = hidden.reshape(-1, hidden.shape[-1])
        each = token_losses(flat, head, targets.reshape(-1), weights.reshape(-1), None, model.logit_cap, axis)
        return each.reshape(targets.shape).sum(1)

    return _over_rows_with_head(model.head, losses, hidden, targets, weights)


def _over_rows_with_head(head: Any, function: Callable[..., Array], *arrays: Array) -> Array:
    """`function(head, *arrays, axis)` with the rows of the arrays, and of the head where that can be, spread over the
    devices."""
    devices = devices_of_context()
    head = head if isinstance(head, VocabularyMatrix) else VocabularyMatrix(head)
    axis = AXIS if devices > 1 and head.delta is None and head.shape[0] % devices == 0 else None
    head, spread = head.split_rows(AXIS) if axis is not None else (head, None)
    return over_rows(partial(function, axis=axis), head, *arrays, spread=spread)
