"""Batched generation with a cache, and text as it arrives.

    prompts   a b c d e    padded on the left to a multiple of 64, so that every row ends in the same slot:
              _ _ _ f g    one forward pass gives all rows their first logits, one slot a step serves them all
    prefill   state, padded prompts                 -> logits of the last token, cache
    step      state, token a row, position, cache   -> logits, cache; the cache is donated: no step copies it
    choose    logits, key of the seed and the step  -> token a row

Padding has negative positions; the model masks it out, and counts each row's own positions from 0.

What is compiled, and when. Prefill, step and choose are jitted once, at the level of this module. The model
comes as `nnx.split` gives it: the graph is static and compared by value, the state is an argument like any
other, so that weights are never baked into a program, and neither a second call nor another adapter of the
same shape compiles anything. What does: a new batch size, a new multiple of 64 of the longest prompt
(prefill) or of it and its answer (both). The settings of the sampling are compiled by themselves, without
the model.
`nnx.jit` is not used, since it would take the model apart and put it together at every token.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.serve.sampling import Sampling, sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEDY = Sampling()
_BUCKET = 64
_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character


class Decoder(Protocol):
    """What `generate` needs of a model; the cache is a pytree of the model's own."""

    def init_cache(self, batch_size: int, capacity: int) -> Any:
        """An empty cache for `capacity` tokens a row."""
        ...

    def decode(self, tokens: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
        """int32 tokens and positions `[b, t]` to (logits of the last token `[b, v]`, the grown cache).

        Args:
            positions: negative where there is padding.
        """
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
    """The answers to a batch of prompts, in their order.

    Args:
        graphdef, state: `nnx.split` of a `Decoder`.
        prompts: token ids, each prompt with at least one.
        max_new_tokens: the most tokens of one answer.
        eos_ids: tokens that end an answer. They are not part of it: it has fewer tokens than `max_new_tokens`
            if, and only if, one of them ended it.
        seed: the same prompts, sampling and seed give the same answers.
        max_positions: the most tokens that prompt and answer may have together; None for no limit.
        on_token: called with (row, token) for each token of an answer as soon as it is known.

    Raises:
        ValueError: before any computation: no prompts, an empty one, max_new_tokens < 1, or more tokens than
            max_positions.
    """
    _check(prompts, max_new_tokens, max_positions)
    padded = round_up(max(map(len, prompts)))
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, padded - len(prompt) :] = prompt
    lengths = np.array([[len(prompt)] for prompt in prompts], np.int32)
    positions = np.arange(-padded, 0, dtype=np.int32) + lengths

    key = jax.random.key(seed)
    logits, cache = _prefill(graphdef, state, tokens, positions, capacity=round_up(padded + max_new_tokens))

    def advance(token: Array, step: int) -> Array:
        nonlocal cache
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
    """The answers of all rows, until the last of them ends.

    Args:
        token: the first token of each row, int32 `[b]`.
        advance: a token a row and its place in the answer to the next token a row, without waiting for either.
    """
    ends, rows = frozenset(eos_ids), token.shape[0]
    answers: list[list[int]] = [[] for _ in range(rows)]
    running = [True] * rows
    for step in range(max_new_tokens):
        current = token
        if step + 1 < max_new_tokens:
            # Queued before `current` is read, so that the device works while the host looks at the tokens;
            # the price is one step too many where an EOS ends the batch.
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


class TextStream:
    """The text of tokens as they come, in whole characters.

    A character may be spread over several tokens, and how a token is written may depend on the one before it
    (some tokenizers drop a space at the very beginning). So the tokens since the last piece are decoded
    together with those of the piece before, whose text is then cut off; a text that ends within a character
    waits for more. The pieces joined are the text of all tokens decoded at once.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", context: Sequence[int] = ()) -> None:
        """A stream that nothing has come from.

        Args:
            context: tokens that came before and are not to be written, such as the prompt of a text that the
                answer continues.
        """
        self._tokenizer = tokenizer
        self._written, self._written_text = list(context), self._decode(context)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that the next token completes, often empty."""
        self._waiting.append(token)
        text = self._decode(self._written + self._waiting)
        return "" if text.endswith(_UNFINISHED) else self._take(text)

    def finish(self) -> str:
        """The text that waits for tokens which will not come."""
        return self._take(self._decode(self._written + self._waiting))

    def _take(self, text: str) -> str:
        piece = text[len(self._written_text) :]
        if piece:  # else tokens without text (special ones): what they follow must stay in view
            self._written, self._waiting = self._waiting, []
            self._written_text = self._decode(self._written)
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        # Cleaning up would change text that has been written: "is n't" becomes "isn't" once the t is there.
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)


@contextlib.contextmanager
def stream_text(
    tokenizer: "PreTrainedTokenizerBase",
    write: Callable[[str], Any],
    *,
    context: Sequence[int] = (),
    row: int = 0,
) -> Iterator[Callable[[int, int], None]]:
    """`with stream_text(tokenizer, write) as on_token: generate(…, on_token=on_token)` writes one answer.

    Args:
        write: gets each piece of text, in whole characters; what waits at the end is written when the block
            is left, also by an exception.
        context: as in `TextStream`.
        row: the row of the batch whose answer it is.
    """
    stream = TextStream(tokenizer, context)

    def on_token(of_row: int, token: int) -> None:
        if of_row == row and (piece := stream.push(token)):
            write(piece)

    try:
        yield on_token
    finally:
        if rest := stream.finish():
            write(rest)


@partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _prefill(graphdef: Any, state: Any, tokens: Array, positions: Array, *, capacity: int) -> tuple[Array, Any]:
    model: Decoder = nnx.merge(graphdef, state)
    return model.decode(tokens, positions, model.init_cache(tokens.shape[0], capacity))


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def decode_step(graphdef: Any, state: Any, token: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
    """A token a row `[b]`, its position `[b, 1]` and the cache to (logits `[b, vocabulary]`, the grown cache)."""
    model: Decoder = nnx.merge(graphdef, state)
    return model.decode(token[:, None], positions, cache)


@partial(jax.jit, static_argnames="sampling")
def choose(logits: Array, key: Array, step: Array | int, *, sampling: Sampling) -> Array:
    """The next token a row, int32 `[b]`: a draw of its own for each step."""
    return sample(logits, jax.random.fold_in(key, jnp.asarray(step)), sampling)


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
        raise ValueError(f"generate: {'; '.join(problems)}")


def round_up(count: int) -> int:
    """To the next multiple of 64, so that few shapes are compiled."""
    return -(-count // _BUCKET) * _BUCKET
