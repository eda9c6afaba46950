"""Batched generation with a key-value cache.

    prompts   a b c d e    padded on the right to a multiple of 64: one forward pass computes the first logits of all rows,
              f g _ _ _    and each step fills one slot of each row, the one after its last token
    prefill   state, padded prompts                     -> logits of the last token, cache
    step      state, one token per row, position, cache -> logits, cache; the cache is donated, so no step copies it
    choose    logits, key of the seed and the step      -> one token per row

Padding has negative positions. The model masks it, and the positions of each row's tokens count from 0. `serve.engine` is
for requests that come and go; this is for a batch that begins at once.

A cache that is outgrown. With LongRoPE and dynamic NTK the rotations of all tokens of a row depend on its length. When a row
outgrows the length for which its cache is right (`LengthDependent.cache_lasts`), the cache is made again by a prefill of all
tokens so far: once a row with LongRoPE, which has two lists of frequencies, and for each token beyond the context with
dynamic NTK. So an answer is that of a forward pass over the whole text, whatever the other rows are.

Compilation. Prefill, step and choose are jitted once, at the level of this module. The model is given as `nnx.split`
returns it: the graph is a static argument that is compared by value, and the state is an ordinary argument. So weights are
never constants of a program, and neither a second call nor another adapter of the same shape compiles anything. A new
program is compiled for a new batch size and for a new multiple of 64 of the longest prompt (prefill) or of the prompt and
its answer (both). The sampling is compiled separately, without the model. `nnx.jit` is not used, because it would split
and merge the model at every token.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.serve.sampling import Sampling, sample

GREEDY = Sampling()
_BUCKET = 64


class Decoder(Protocol):
    """A model that `generate` can use; the cache is any pytree."""

    def init_cache(self, batch_size: int, capacity: int) -> Any:
        """Return an empty cache for `capacity` tokens per row."""
        ...

    def decode(self, tokens: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
        """Process new tokens; return (logits of the last token `[b, v]`, the cache including the new tokens).

        Args:
            tokens: int32 `[b, t]`, padded on the right.
            positions: int32 `[b, t]`, increasing by one in each row, negative for padding.
            cache: the cache of the tokens so far.
        """
        ...


@runtime_checkable
class LengthDependent(Protocol):
    """A `Decoder` whose cache may be right only for rows up to some length."""

    def init_cache(self, batch_size: int, capacity: int, lengths: Array | None = None) -> Any:
        """Return an empty cache for `capacity` tokens per row, whose prompts have `lengths`, int32 `[b]`."""
        ...

    def cache_lasts(self, length: int) -> int | None:
        """Return the length up to which the cache of a row of `length` tokens is right when the row grows; None: always."""
        ...


def generate(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    max_positions: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the answers to a batch of prompts as lists of token ids, in the order of the prompts.

    Args:
        graphdef, state: `nnx.split` of a `Decoder`.
        prompts: token ids; each prompt has at least one.
        max_new_tokens: the most tokens of an answer.
        eos_ids: tokens that end an answer and are not part of it. An answer has fewer than `max_new_tokens` tokens if and
            only if one of them ended it.
        sampling: how the next token is chosen.
        seed: the same prompts, sampling and seed give the same answers.
        max_positions: the most tokens of a prompt and its answer together; None: no limit.
        on_token: called with (row, token) for each token of an answer as soon as it is known.

    Raises:
        OptionError: no prompts, an empty prompt, max_new_tokens < 1, or more tokens than max_positions; it is raised before
            any computation.
    """
    _check(prompts, max_new_tokens, max_positions)
    padded = round_up(max(map(len, prompts)))
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([[len(prompt)] for prompt in prompts], np.int32)

    model = nnx.merge(graphdef, state)
    longest, capacity = int(lengths.max()), round_up(padded + max_new_tokens)
    cache_lasts = model.cache_lasts if isinstance(model, LengthDependent) else lambda _: None
    lasts = [cache_lasts(len(prompt)) for prompt in prompts]
    outgrown = any(last is not None and longest + max_new_tokens > last for last in lasts)
    answered: list[Array] = []
    key = jax.random.key(seed)
    logits, cache = _prefill(graphdef, state, tokens, _positions(lengths, padded), capacity=capacity)

    def advance(token: Array, step: int) -> Array:
        nonlocal cache, lasts
        if outgrown:
            answered.append(token)
        now = [len(prompt) + step + 1 for prompt in prompts]
        if any(last is not None and length > last for length, last in zip(now, lasts, strict=True)):
            lasts = [cache_lasts(length) for length in now]
            width = round_up(max(now))
            text = np.pad(tokens, ((0, 0), (0, max(0, width - padded))))[:, :width]
            for row, answer in enumerate(np.stack(answered, axis=1)):
                text[row, len(prompts[row]) : now[row]] = answer
            del cache  # before there is another one
            logits, cache = _prefill(graphdef, state, text, _positions(lengths + step + 1, width), capacity=capacity)
        else:
            logits, cache = decode_step(graphdef, state, token, lengths + step, cache)
        return choose(logits, key, step + 1, sampling=sampling)

    first = choose(logits, key, 0, sampling=sampling)
    return collect_answers(first, advance, max_new_tokens=max_new_tokens, eos_ids=eos_ids, on_token=on_token)


def collect_answers(
    token: Array,
    advance: Callable[[Array, int], Array],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    on_token: Callable[[int, int], None] | None,
) -> list[list[int]]:
    """Return the answers of all rows; stop when the last row has ended.

    Args:
        token: int32 `[b]`, the first token of each row.
        advance: maps (one token per row, its index in the answer) to the next token per row, without waiting for the device.
        max_new_tokens, eos_ids, on_token: as for `generate`.
    """
    ends, rows = frozenset(eos_ids), token.shape[0]
    answers: list[list[int]] = [[] for _ in range(rows)]
    running = [True] * rows
    for step in range(max_new_tokens):
        current = token
        if step + 1 < max_new_tokens:
            # This is queued before `current` is read, so that the device works while the host processes the tokens. It
            # costs one unnecessary step if an EOS ends the batch.
            token = advance(token, step)
        for row, value in enumerate(np.asarray(current).tolist()):
            running[row] = running[row] and value not in ends
            if running[row]:
                answers[row].append(value)
                if on_token is not None:
                    on_token(row, value)
        if not any(running):
            break
    return answers


@partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _prefill(graphdef: Any, state: Any, tokens: Array, positions: Array, *, capacity: int) -> tuple[Array, Any]:
    model = nnx.merge(graphdef, state)
    rows, lengths = tokens.shape[0], positions.max(axis=1) + 1
    by_length = isinstance(model, LengthDependent)
    cache = model.init_cache(rows, capacity, lengths) if by_length else model.init_cache(rows, capacity)
    return model.decode(tokens, positions, cache)


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def decode_step(graphdef: Any, state: Any, token: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
    """Process one token per row `[b]` at positions `[b, 1]`; return (logits `[b, vocabulary]`, the cache including it)."""
    model: Decoder = nnx.merge(graphdef, state)
    return model.decode(token[:, None], positions, cache)


@partial(jax.jit, static_argnames="sampling")
def choose(logits: Array, key: Array, step: Array | int, *, sampling: Sampling) -> Array:
    """Return the next token of each row, int32 `[b]`; each step draws with a different random key."""
    return sample(logits, jax.random.fold_in(key, jnp.asarray(step)), sampling)


def _positions(lengths: np.ndarray, width: int) -> np.ndarray:
    """Return the positions `[b, width]` of rows of `lengths` `[b, 1]`, -1 for the padding after them."""
    positions = np.arange(width, dtype=np.int32)[None]
    return np.where(positions < lengths, positions, -1)


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_positions: int | None) -> None:
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    problems = [f"prompt {row}: expected at least one token, found none" for row in empty]
    if not prompts:
        problems.append("prompts: expected at least one, found none")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    elif max_positions is not None:
        problems += [
            f"prompt {row}: expected at most {max_positions} tokens with its answer, found {len(prompt)} and "
            f"{max_new_tokens} for the answer (max_new_tokens)"
            for row, prompt in enumerate(prompts)
            if len(prompt) + max_new_tokens > max_positions
        ]
    if problems:
        raise OptionError(f"generate: {'; '.join(problems)}")


def round_up(count: int) -> int:
    """Return the next multiple of 64, so that few shapes are compiled."""
    return -(-count // _BUCKET) * _BUCKET
