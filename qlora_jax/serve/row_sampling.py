"""The sampling program of the engine: one token for each row, with the settings of each row as arrays.

    logits [B, v]  ->  bias, penalties, allowed tokens  ->  temperature, top-k, top-p, min-p  ->  one draw per row

`serve.request.Choices` defines the steps. A row's random key is made from its seed, the number of its answer and the number
of the token, so a draw depends neither on the other rows nor on the row in which the answer happens to be. The searches for
the limits of top-k and top-p and for the most likely tokens are skipped in steps in which no row asks for them.

A step need not draw for all B rows: it draws for R of them, and its cost grows with R.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlora_jax.serve.request import MOST_TOP_LOGPROBS, Choices
from qlora_jax.serve.sampling import LEAST_TEMPERATURE, kth_highest, outside_top_p

__all__ = ["Drawn", "Draws", "RowMemory", "RowSettings", "all_allowed", "begin_row", "empty_memory", "sample_rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The settings of all rows; arrays `[B]`, float32 where nothing else is said."""

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray  # int32; the size of the vocabulary: no limit
    top_p: Array | np.ndarray
    min_p: Array | np.ndarray
    repetition_penalty: Array | np.ndarray
    presence_penalty: Array | np.ndarray
    frequency_penalty: Array | np.ndarray
    seed: Array | np.ndarray  # uint32 [B, 3]: low and high half of the seed, number of the answer
    wants_top: Array | np.ndarray  # bool

    @staticmethod
    def of(rows: Sequence[tuple[Choices, int, bool] | None], vocabulary: int) -> "RowSettings":
        """Return the settings of rows, each (how tokens are chosen, number of the answer, whether top logprobs are wanted).

        Args:
            rows: None for a row that is not in use.
            vocabulary: the number of logits.
        """
        used = [row or (Choices(), 0, False) for row in rows]
        choices = [row[0] for row in used]

        def floats(name: str, default: float = 0.0) -> np.ndarray:
            values = [getattr(choice, name) for choice in choices]
            return np.asarray([default if value is None else value for value in values], np.float32)

        low, high = [choice.seed & 0xFFFFFFFF for choice in choices], [choice.seed >> 32 & 0xFFFFFFFF for choice in choices]
        return RowSettings(
            floats("temperature"),
            np.asarray([min(choice.top_k or vocabulary, vocabulary) for choice in choices], np.int32),
            floats("top_p", 1.0),
            floats("min_p"),
            floats("repetition_penalty"),
            floats("presence_penalty"),
            floats("frequency_penalty"),
            np.stack([np.asarray(x, np.uint32) for x in (low, high, [row[1] for row in used])], axis=1),
            np.asarray([row[2] for row in used]),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMemory:
    """What the sampling program remembers of each row's text.

    Attributes:
        token: int32 `[B]`, the token that was drawn last.
        counts: int32 `[B, v]`, how often each token is in the answer.
        in_prompt: bool `[B, v]`, whether each token is in the prompt.
        bias: float32 `[B, v]`, added to the logits.
    """

    token: Array
    counts: Array
    in_prompt: Array
    bias: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """The rows that a step draws a token for.

    Attributes:
        rows: int32 `[R]`, R <= B; B for an entry without a row. If R is B, entry i is i or B.
        steps: int32 `[R]`, the number of each row's token in its answer.
        allowed: int32 `[R, ceil(v / 32)]`, the tokens that may be drawn (`all_allowed`).
    """

    rows: Array | np.ndarray
    steps: Array | np.ndarray
    allowed: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn; log probabilities are those of the model, before any setting.

    Attributes:
        token: int32 `[R]`.
        logprob: float32 `[R]`, of the token.
        top_tokens: int32 `[R, 20]`, the most likely tokens; zeros if no row asks for them.
        top_logprobs: float32 `[R, 20]`.
    """

    token: Array
    logprob: Array
    top_tokens: Array
    top_logprobs: Array


def empty_memory(rows: int, vocabulary: int) -> RowMemory:
    """Return the memory of rows without texts."""
    shape = (rows, vocabulary)
    return RowMemory(
        jnp.zeros(rows, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32)
    )


def all_allowed(rows: int, vocabulary: int) -> np.ndarray:
    """Return the mask int32 `[B, ceil(v / 32)]` that allows each token: bit i of word j is for token 32 j + i."""
    return np.full((rows, -(-vocabulary // 32)), -1, np.int32)


def begin_row(memory: RowMemory, row: Array, counts: Array, in_prompt: Array, bias: Array) -> RowMemory:
    """Return the memory with the text of one row replaced; the arrays are `[v]`."""
    return RowMemory(
        memory.token,
        memory.counts.at[row].set(counts),
        memory.in_prompt.at[row].set(in_prompt),
        memory.bias.at[row].set(bias),
    )


def sample_rows(logits: Array, memory: RowMemory, settings: RowSettings, draws: Draws) -> tuple[Drawn, RowMemory]:
    """Draw one token for each of R rows.

    Args:
        logits: float32 `[B, v]`.
        memory: the texts of all rows; that of the other rows does not change.
        settings: those of all rows.
        draws: which rows.
    """
    rows, count = jnp.asarray(draws.rows), logits.shape[0]
    active = rows < count
    whole = rows.size == count

    def own(x: Array | np.ndarray) -> Array:
        return jnp.asarray(x) if whole else jnp.asarray(x).at[rows].get(mode="clip")

    logits, settings = own(logits), jax.tree.map(own, settings)
    past = jax.tree.map(own, memory)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    scores = _allowed_only(_penalised(logits, past, settings), jnp.asarray(draws.allowed))
    greedy = jnp.argmax(scores, axis=-1)
    random = active & (settings.temperature > 0)
    drawn = jax.lax.cond(random.any(), lambda: _draw(scores, settings, draws.steps, random), lambda: greedy)
    token = jnp.where(random, drawn, greedy).astype(jnp.int32)

    most = min(MOST_TOP_LOGPROBS, logits.shape[-1])
    none = jnp.zeros((rows.size, most), jnp.float32), jnp.zeros((rows.size, most), jnp.int32)
    wanted = (active & settings.wants_top).any()
    top, ids = jax.lax.cond(wanted, lambda: tuple(jax.lax.top_k(logprobs, most)), lambda: none)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    counts = memory.counts.at[rows, token].add(1, mode="drop")
    tokens = memory.token.at[rows].set(token, mode="drop")
    return Drawn(token, logprob, ids, top), RowMemory(tokens, counts, memory.in_prompt, memory.bias)


def _penalised(logits: Array, memory: RowMemory, settings: RowSettings) -> Array:
    scores = logits + memory.bias
    answered = memory.counts > 0
    repetition = settings.repetition_penalty[:, None]
    repeated = jnp.where(scores > 0, scores / repetition, scores * repetition)
    scores = jnp.where(answered | memory.in_prompt, repeated, scores)
    presence, frequency = settings.presence_penalty[:, None], settings.frequency_penalty[:, None]
    return scores - presence * answered.astype(jnp.float32) - frequency * memory.counts.astype(jnp.float32)


def _allowed_only(scores: Array, allowed: Array) -> Array:
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    mask = bits.reshape(allowed.shape[0], -1)[:, : scores.shape[-1]]
    return jnp.where(mask == 1, scores, -jnp.inf)


def _draw(scores: Array, settings: RowSettings, steps: Array | np.ndarray, draws: Array) -> Array:
    """Return one draw for each row, int `[R]`; meaningless where `draws` is false."""
    scores = scores / jnp.where(draws, jnp.maximum(settings.temperature, LEAST_TEMPERATURE), 1.0)[:, None]
    few, likely = draws & (settings.top_k < scores.shape[-1]), draws & (settings.top_p < 1)
    scores = jax.lax.cond(few.any(), _top_k_only, lambda scores, _: scores, scores, settings)
    scores = jax.lax.cond(likely.any(), _top_p_only, lambda scores, _: scores, scores, settings)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    least = highest + jnp.log(settings.min_p)[:, None]  # -inf for 0, which excludes nothing
    scores = jnp.where(scores < least, -jnp.inf, scores)

    def draw(row: Array, seed: Array, step: Array) -> Array:
        key = jax.random.key(seed[0])
        for part in (seed[1], seed[2], step):
            key = jax.random.fold_in(key, part)
        return jax.random.categorical(key, row)

    return jax.vmap(draw)(scores, jnp.asarray(settings.seed), jnp.asarray(steps))


def _top_k_only(scores: Array, settings: RowSettings) -> Array:
    lowest = kth_highest(scores, jnp.asarray(settings.top_k)[:, None])
    return jnp.where(scores < lowest, -jnp.inf, scores)


def _top_p_only(scores: Array, settings: RowSettings) -> Array:
    top_p = jnp.asarray(settings.top_p)[:, None]
    return jnp.where(outside_top_p(scores, top_p) & (top_p < 1), -jnp.inf, scores)
