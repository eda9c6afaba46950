"""Logits of a few tokens after each prompt: what a model would choose if it had to answer with one of them.

Prompts are padded to few lengths (lengths.py), so that few programs are compiled. Only the logits after the last token of a
prompt are calculated, not those of the whole vocabulary at every position.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from qlora_jax.evaluate.lengths import padded_batches
from qlora_jax.nn import context_mesh, put_rows, row_shards

__all__ = ["LanguageModel", "choice_logits"]


class LanguageModel(Protocol):
    """A decoder-only model that can be asked to choose."""

    def hidden(self, tokens: Array) -> Array:
        """Return the normalized last hidden states `[b, t, features]` of int32 tokens `[b, t]`, with causal attention."""
        ...

    def logits(self, hidden: Array) -> Array:
        """Return the logits `[b, vocabulary]` of hidden states `[b, features]`."""
        ...


def choice_logits(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    rows: Sequence[np.ndarray],
    choices: Sequence[int],
    *,
    batch_size: int,
    progress: str | None = None,
) -> np.ndarray:
    """Return the logits of tokens after each prompt, float32 `[n, choices]`.

    Args:
        graphdef, state: `nnx.split` of a `LanguageModel`.
        rows: the prompts, int32 `[t_i]`.
        choices: the ids of the tokens.
        batch_size: number of rows in a batch. In the context of a mesh (`jax.set_mesh(data_mesh())`) the rows are split over
            its devices, and their number is rounded up to a multiple of the devices.
        progress: the name of a progress bar; None: there is none.
    """
    mesh, devices = context_mesh(), row_shards()
    batches = padded_batches(rows, -(-batch_size // devices) * devices)
    result = np.zeros((len(rows), len(choices)), np.float32)
    wanted = np.asarray(choices, np.int32)
    for indices, tokens, lengths in tqdm(batches, desc=progress, unit="batch", leave=False, disable=progress is None):
        placed = put_rows(mesh, (tokens, lengths))
        result[indices] = np.asarray(_last_logits(graphdef, state, *placed, wanted))[: len(indices)]
    return result


@partial(jax.jit, static_argnames="graphdef")
def _last_logits(graphdef: Any, state: Any, tokens: Array, lengths: Array, choices: Array) -> Array:
    model: LanguageModel = nnx.merge(graphdef, state)
    hidden = model.hidden(tokens)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last)[:, choices].astype(jnp.float32)
