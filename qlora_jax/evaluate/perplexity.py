"""Perplexity over a sliding window, as transformers' guide to perplexity calculates it.

    text       a b c d e f g h i j        a window of 6 tokens that moves by 3 (the stride)
    window 1   a B C D E F                capital letters are scored, small ones are only read
    window 2         d e f G H I
    window 3               g h i J

    perplexity    = exp(-Σ log p / tokens)             over the scored tokens of all texts
    bits per byte = -Σ log₂ p / bytes                  bytes of UTF-8 of their text, which does not depend on the tokenizer

With a stride below the window, every token but the first is scored once, most of them after at least (window - stride)
tokens. With a stride as large as the window, the first token of each window is not scored, because nothing is before it.

The intervals resample the texts, or the windows of a single text (`bootstrap`). Two models are compared by the same
resamples of the same texts, so that the difficulty of a text cancels (`compare_perplexities`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax import nnx

from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate.bootstrap import over_questions
from qlora_jax.evaluate.documents import Document
from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.likelihood import token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Perplexity", "Window", "compare_perplexities", "evaluate_perplexity", "sliding_windows"]


@dataclass(frozen=True)
class Window:
    """A part of a text.

    Attributes:
        document: index of the text.
        start, stop: the tokens that the model reads.
        scored: the first token that is scored; those up to `stop` are.
    """

    document: int
    start: int
    stop: int
    scored: int


@dataclass(frozen=True)
class Perplexity:
    """Sums over the scored tokens of each unit that is resampled: a text, or a window if there is one text.

    Attributes:
        nats: float64 `[units]`, the negative log-probabilities.
        tokens: int `[units]`.
        bytes: int `[units]`.
        greedy: int `[units]`, how many tokens are the most likely ones.
        kind: "documents" or "windows".
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    greedy: np.ndarray
    kind: str

    @property
    def loss(self) -> float:
        """The mean negative log-probability of a token, in nats."""
        return float(self.nats.sum() / self.tokens.sum())

    def perplexity(self, *, resamples: int = 1_000, seed: int = 0) -> Interval:
        """Return the perplexity; its bounds are NaN with fewer than two units."""
        low, high = self._bounds(self.tokens, resamples, seed)
        return Interval(float(np.exp(self.loss)), float(np.exp(low)), float(np.exp(high)))

    def bits_per_byte(self, *, resamples: int = 1_000, seed: int = 0) -> Interval:
        """Return the bits per byte of text; NaN if no scored token has text."""
        total = self.bytes.sum()
        if not total:
            return Interval(np.nan, np.nan, np.nan)
        low, high = self._bounds(self.bytes, resamples, seed)
        return Interval(*(float(value / np.log(2)) for value in (self.nats.sum() / total, low, high)))

    def _bounds(self, counts: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        def mean(drawn: np.ndarray) -> np.ndarray:
            return _ratio(drawn @ self.nats, drawn @ counts)

        return over_questions(mean, len(self.nats), resamples=resamples, seed=seed)


def compare_perplexities(ours: Perplexity, other: Perplexity, *, resamples: int = 1_000, seed: int = 0) -> Interval:
    """Return perplexity of ours over that of the other minus 1, in percent, with a paired interval over the same texts.

    Raises:
        DataError: the two are of different texts.
    """
    if not np.array_equal(ours.tokens, other.tokens):
        raise DataError(
            f"perplexities: expected those of the same tokens, found {ours.tokens.sum():,} and {other.tokens.sum():,}"
        )

    def change(drawn: np.ndarray) -> np.ndarray:
        return 100 * np.expm1(_ratio(drawn @ (ours.nats - other.nats), drawn @ ours.tokens))

    low, high = over_questions(change, len(ours.nats), resamples=resamples, seed=seed)
    return Interval(float(100 * np.expm1(ours.loss - other.loss)), float(low), float(high))


def sliding_windows(length: int, max_length: int, stride: int, *, document: int = 0) -> list[Window]:
    """Return the windows of a text of so many tokens, which together score each token at most once.

    Raises:
        OptionError: a window of fewer than 2 tokens, or a stride that is not from 1 to the window.
    """
    if max_length < 2:
        raise OptionError(f"max_length: expected at least 2, found {max_length}")
    if not 1 <= stride <= max_length:
        raise OptionError(f"stride: expected 1 to max_length ({max_length}), found {stride}")
    found, scored = [], 0
    for start in range(0, length, stride):
        stop = min(start + max_length, length)
        found.append(Window(document, start, stop, max(scored, start + 1)))
        scored = stop
        if stop == length:
            break
    return [window for window in found if window.scored < window.stop]


def evaluate_perplexity(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    stride: int,
    batch_size: int = 4,
    progress: bool = False,
) -> Perplexity:
    """Return the perplexity of a decoder-only model.

    Args:
        graphdef, state: `nnx.split` of a `likelihood.ScoredModel`.
        documents: the texts; only their tokens that are marked so are scored.
        tokenizer: makes the text of the scored tokens, whose bytes are counted.
        max_length: tokens of a window.
        stride: by how many tokens a window moves.
        batch_size: windows in a batch.
        progress: whether to show a progress bar.

    Raises:
        OptionError: see `sliding_windows`.
        DataError: no token is scored.
    """
    windows = [
        window
        for number, document in enumerate(documents)
        for window in sliding_windows(len(document.tokens), max_length, stride, document=number)
        if document.scored[window.scored : window.stop].any()
    ]
    if not windows:
        raise DataError("perplexity: expected a text of at least two tokens, found none that has a token to score")
    rows = [documents[window.document].tokens[window.start : window.stop] for window in windows]
    found = token_scores(graphdef, state, rows, batch_size=batch_size, progress=progress, label="perplexity")
    single = len(documents) == 1
    sums = np.zeros((4, len(windows) if single else len(documents)))
    for number, (window, scores) in enumerate(zip(windows, found, strict=True)):
        document = documents[window.document]
        chosen = document.scored[window.scored : window.stop]
        part = slice(window.scored - window.start - 1, window.stop - window.start - 1)
        values = (
            -scores.log_probabilities[part][chosen].sum(),
            chosen.sum(),
            _bytes(document.tokens[window.scored : window.stop], chosen, tokenizer),
            scores.greedy[part][chosen].sum(),
        )
        sums[:, number if single else window.document] += values
    sums = sums[:, sums[1] > 0]
    counts = sums[1:].astype(np.int64)
    return Perplexity(sums[0], *counts, kind="windows" if single else "documents")


def _bytes(tokens: np.ndarray, chosen: np.ndarray, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the bytes of the text of the chosen tokens, of each run of neighbours at once; special tokens have none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))
    texts = [
        cast(str, tokenizer.decode(tokens[start:stop].tolist(), skip_special_tokens=True))
        for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)
