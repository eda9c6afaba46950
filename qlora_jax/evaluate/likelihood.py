"""Log-probabilities that a decoder-only model gives to the tokens of texts.

    hidden = model.hidden(tokens)                                          [b, t, d]
    log_probability[i] = logits(hidden[i - 1])[tokens[i]] - logsumexp(logits(hidden[i - 1]))        for i = 1 … t - 1

Rows are padded on the right to few lengths (`lengths`). The logits exist for a chunk of positions at a time, because those
of a whole batch would be larger than the model where the vocabulary is large.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from qlora_jax.evaluate.lengths import padded_batches
from qlora_jax.nn import context_mesh, put_rows, row_shards

__all__ = ["ScoredModel", "TokenScores", "token_scores"]

_POSITIONS = 512  # whose logits exist at a time


class ScoredModel(Protocol):
    """A decoder-only model whose texts can be scored."""

    def hidden(self, tokens: Array, *, positions: Array) -> Array:
        """Return the normalized last hidden states `[b, t, features]` of int32 tokens `[b, t]`, with causal attention."""
        ...

    def logits(self, hidden: Array) -> Array:
        """Return the logits `[…, vocabulary]` of hidden states `[…, features]`."""
        ...


class TokenScores(NamedTuple):
    """The scores of one text of t tokens; the first token has nothing before it, and no score.

    Attributes:
        log_probabilities: float64 `[t - 1]`, in nats.
        greedy: bool `[t - 1]`, whether each token is the most likely one.
    """

    log_probabilities: np.ndarray
    greedy: np.ndarray


def token_scores(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    rows: Sequence[np.ndarray],
    *,
    batch_size: int = 8,
    progress: bool = False,
    label: str = "scoring",
) -> list[TokenScores]:
    """Return the scores of texts, in their order.

    Args:
        graphdef, state: `nnx.split` of a `ScoredModel`.
        rows: the token ids of each text, int32 `[t_i]`, at least one.
        batch_size: number of rows in a batch. In the context of a mesh (`jax.set_mesh(data_mesh())`) the rows are split over
            its devices, and their number is rounded up to a multiple of the devices.
        progress: whether to show a progress bar.
        label: the text before the progress bar.
    """
    mesh, devices = context_mesh(), row_shards()
    # The last token of a row is a target alone: a row of one token more than a power of two is not padded to the next one.
    batches = padded_batches([row[:-1] for row in rows], -(-batch_size // devices) * devices)
    found: dict[int, TokenScores] = {}
    with tqdm(total=len(rows), desc=label, unit=" rows", leave=False, disable=not progress) as bar:
        for indices, tokens, lengths in reversed(batches):  # the slowest first, so that the estimate of the time is no less
            targets = np.zeros_like(tokens)
            for row, index in enumerate(indices):
                targets[row, : len(rows[index]) - 1] = rows[index][1:]
            placed = put_rows(mesh, (tokens, lengths, targets))
            scores, greedy = map(np.asarray, _scores(graphdef, state, *placed))
            for row, index in enumerate(indices):
                length = len(rows[index]) - 1
                found[index] = TokenScores(scores[row, :length].astype(np.float64), greedy[row, :length])
            bar.update(len(indices))
    return [found[index] for index in range(len(rows))]


@partial(jax.jit, static_argnames="graphdef")
def _scores(graphdef: Any, state: Any, tokens: Array, lengths: Array, targets: Array) -> tuple[Array, Array]:
    """Return (the log-probabilities of the targets, float32, whether they are the most likely ones), `[b, t]`."""
    model: ScoredModel = nnx.merge(graphdef, state)
    rows, length = tokens.shape
    index = jnp.arange(length, dtype=jnp.int32)[None]
    # The positions end where a text ends: with some scalings the rotations depend on the largest one.
    hidden = model.hidden(tokens, positions=jnp.where(index < lengths[:, None], index, 0))
    size = max(1, _POSITIONS // rows)
    while length % size:
        size -= 1

    def chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.logits(inputs[0]).astype(jnp.float32)  # [b, size, vocabulary]
        chosen = jnp.take_along_axis(logits, inputs[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == inputs[1]

    chunks = tuple(jnp.moveaxis(x.reshape(rows, length // size, size, *x.shape[2:]), 1, 0) for x in (hidden, targets))
    scores, greedy = (jnp.moveaxis(x, 0, 1).reshape(rows, length) for x in jax.lax.map(chunk, chunks))
    return scores, greedy
