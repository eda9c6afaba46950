"""The texts of a study, and the loss of a model on each of them.

loss of a text             -Σ log p(token | tokens before it), over all its tokens except the first
log-perplexity of a text   loss / number of those tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, encode_all, open_source
from qlora_jax.evaluate import padded_batches
from qlora_jax.finetune.objectives.corpus import named_errors
from qlora_jax.nn import context_mesh, put_rows, row_shards
from qlora_jax.train.loss import row_losses

LEAST = 16  # least number of tokens in a text: the mean over fewer tokens is mostly noise


@dataclass(frozen=True)
class Texts:
    """Texts as tokens.

    Attributes:
        tokens: the tokens of each text, int32.
        sources: number of texts by the name of their source.
    """

    tokens: tuple[np.ndarray, ...]
    sources: dict[str, int]

    @property
    def predicted(self) -> np.ndarray:
        """The number of predicted tokens of each text."""
        return np.asarray([len(row) - 1 for row in self.tokens])


def read_texts(
    sources: Sequence[str], split: str | None, tokenizer: PreTrainedTokenizerFast, *, count: int, length: int, seed: int
) -> Texts:
    """Return a random sample of texts, about equally many from each source, each truncated to `length` tokens.

    Records become text as in scripts/train.py.

    Raises:
        DataError: rows cannot be used, or too few of them have at least `LEAST` tokens.
    """
    tokens: list[np.ndarray] = []
    counts: dict[str, int] = {}
    for number, source in enumerate(sources):
        wanted = count // len(sources) + (number < count % len(sources))
        with named_errors(source):
            examples, _ = encode_all(
                open_source(source, split).records, tokenizer, max_length=length, train_on_source=True, progress=False
            )
        long = [example.tokens for example in examples if len(example) >= LEAST]
        if len(long) < wanted:
            raise DataError(f"{source}: expected {wanted} texts of at least {LEAST} tokens (--texts), found {len(long)}")
        drawn = np.random.default_rng([seed, number]).choice(len(long), wanted, replace=False)
        tokens += [long[index] for index in sorted(drawn.tolist())]
        counts[source] = wanted
    return Texts(tuple(tokens), counts)


def text_losses(
    graphdef: nnx.GraphDef[Any], state: Any, texts: Texts, *, batch_size: int, progress: bool = False
) -> np.ndarray:
    """Return the loss of each text, float64 `[n]`; in the context of a mesh, rows are distributed over its devices."""
    mesh, devices = context_mesh(), row_shards()
    result = np.zeros(len(texts.tokens))
    batches = padded_batches(texts.tokens, -(-batch_size // devices) * devices)
    for indices, tokens, lengths in tqdm(batches, desc="texts", unit="batch", leave=False, disable=not progress):
        placed = put_rows(mesh, (tokens, lengths))
        result[indices] = np.asarray(_losses(graphdef, state, *placed))[: len(indices)]
    return result


@partial(jax.jit, static_argnames="graphdef")
def _losses(graphdef: Any, state: Any, tokens: Array, lengths: Array) -> Array:
    model = nnx.merge(graphdef, state)
    targets = jnp.roll(tokens, -1, axis=1)
    weights = (jnp.arange(tokens.shape[1]) < lengths[:, None] - 1).astype(jnp.float32)
    return row_losses(model, model.hidden(tokens), targets, weights)
