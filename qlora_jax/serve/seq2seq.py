"""Batched generation with an encoder-decoder.

    sources   a b c d e     padded on the right to a multiple of 64 and masked
              f g _ _ _
    begin     state, sources, mask           -> cache: keys and values of the encoded sources, and space for the answers
    step      state, one token per row, cache -> logits, cache; the first token is the decoder's start token, the cache is
                                                donated

Programs are compiled as described in serve/generate.py: for a new batch size, and for a new multiple of 64 of the longest
source or of the limit of the answers.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.serve.generate import GREEDY, choose, collect_answers, round_up
from qlora_jax.serve.sampling import Sampling


class Seq2SeqModel(Protocol):
    """A model that `generate_seq2seq` can use; the cache is any pytree."""

    def encode(self, sources: Array, source_mask: Array) -> Array:
        """Return the hidden states `[b, s, d]` of int32 sources `[b, s]` with a bool mask `[b, s]`."""
        ...

    def init_cache(self, encoded: Array, source_mask: Array, capacity: int) -> Any:
        """Return a cache for `capacity` targets per row."""
        ...

    def decode(self, tokens: Array, cache: Any) -> tuple[Array, Any]:
        """Process one target per row, int32 `[b]`; return (logits `[b, v]`, the cache including it)."""
        ...


def generate_seq2seq(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    sources: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    decoder_start_id: int = 0,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the answers to a batch of sources as lists of token ids, in the order of the sources.

    Args:
        graphdef, state: `nnx.split` of a `Seq2SeqModel`.
        sources: token ids; each source has at least one.
        eos_ids: tokens that end an answer and are not part of it.
        decoder_start_id: the first token that the decoder reads, which is not part of the answer.
        max_new_tokens, sampling, seed, on_token: as for `generate`.

    Raises:
        OptionError: no sources, an empty source, or max_new_tokens < 1; it is raised before any computation.
    """
    problems = [f"source {row}: expected at least one token, found none" for row, source in enumerate(sources) if not source]
    if not sources:
        problems.append("sources: expected at least one, found none")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if problems:
        raise OptionError(f"generate_seq2seq: {'; '.join(problems)}")

    rows, length = len(sources), round_up(max(map(len, sources)))
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row, source in enumerate(sources):
        tokens[row, : len(source)], mask[row, : len(source)] = source, True
    key = jax.random.key(seed)
    cache = _begin(graphdef, state, tokens, mask, capacity=round_up(max_new_tokens))

    def advance(token: Array, step: int) -> Array:
        nonlocal cache
        logits, cache = _step(graphdef, state, token, cache)
        return choose(logits, key, step + 1, sampling=sampling)

    first = advance(jnp.full((rows,), decoder_start_id, jnp.int32), -1)
    return collect_answers(first, advance, max_new_tokens=max_new_tokens, eos_ids=eos_ids, on_token=on_token)


@partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _begin(graphdef: Any, state: Any, sources: Array, mask: Array, *, capacity: int) -> Any:
    model: Seq2SeqModel = nnx.merge(graphdef, state)
    return model.init_cache(model.encode(sources, mask), mask, capacity)


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _step(graphdef: Any, state: Any, token: Array, cache: Any) -> tuple[Array, Any]:
    model: Seq2SeqModel = nnx.merge(graphdef, state)
    return model.decode(token, cache)
