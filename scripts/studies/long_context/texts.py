"""Texts with a key hidden in filler, which ask for the key at their end, as tokens with positions that may have gaps.

    ... filler | The pass key is 48213. Remember it. | filler ... | What is the pass key? The pass key is 48213

A short text skips most of the positions up to its last one: random shares of the skipped positions are before its pieces
(sentences), most of them before a few pieces. The order of tokens is unchanged, as in PoSE (Zhu et al. 2023).
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.data import PLAIN_ANSWERS
from qlora_jax.errors import UnsupportedError

DIGITS = 5  # digits of a key
OTHERS = 0.03  # weight in the loss of tokens that are not digits of an answer
DEPTHS = ("first third", "middle", "last third")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text that asks for a key.

    Attributes:
        kind: "within", "beyond" or "real".
        tokens: int32 `[t]`, which end with the digits of the answer.
        positions: int32 `[t]`.
        depth: the key's position as a share of the last one.
    """

    kind: str
    tokens: np.ndarray
    positions: np.ndarray
    depth: float

    @property
    def third(self) -> str:
        return DEPTHS[min(int(3 * self.depth), 2)]


class Writer:
    """Draws texts with keys in them, as tokens."""

    def __init__(self, tokenizer: Any, sentences: Sequence[str], seed: int) -> None:
        self._encode = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
        self._sentences = [self._encode(f" {sentence}") for sentence in sentences]
        self._draws = np.random.default_rng(seed)

    def key(self) -> tuple[list[int], list[int]]:
        """Return the sentences that state a key, and those that ask for it, including the answer."""
        digits = "".join(map(str, self._draws.integers(0, 10, DIGITS)))
        statement = self._encode(f" The pass key is {digits}. Remember it.")
        request = " What is the pass key? The pass key is "
        question = self._encode(request + digits)
        if question[:-DIGITS] != self._encode(request):
            raise UnsupportedError(
                f"model: expected a tokenizer that makes a token of each digit, found {question[-DIGITS:]} for {digits}"
            )
        return statement, question

    def filler(self, count: int) -> Iterator[list[int]]:
        """Yield sentences with `count` tokens together; the last sentence is truncated."""
        while count > 0:
            sentence = self._sentences[self._draws.integers(len(self._sentences))][:count]
            count -= len(sentence)
            yield sentence

    def row(self, length: int, extended: int, reach: int) -> dict[str, np.ndarray]:
        """Return a training row, arrays `[length]`: packed documents, each with its own key and its own positions.

        There are at most `reach` tokens from the statement of a key to the end of the answer.
        """
        documents: list[dict[str, np.ndarray]] = []
        total = 0
        while total <= length:
            statement, question = self.key()
            between = int(self._draws.integers(reach - len(statement) - len(question) + 1))
            before = int(self._draws.integers(reach // 2))
            pieces = [*self.filler(before), statement, *self.filler(between), question]
            tokens = np.concatenate(pieces)
            document = {
                "inputs": tokens[:-1],
                "targets": tokens[1:],
                "loss_mask": np.where(np.arange(1, len(tokens)) >= len(tokens) - DIGITS, 1, OTHERS),
                "positions": self._positions(pieces, int(self._draws.integers(len(tokens), extended + 1)))[:-1],
                "segment_ids": np.full(len(tokens) - 1, len(documents) + 1),
            }
            documents.append(document)
            total += len(tokens) - 1
        row = {name: np.concatenate([document[name] for document in documents])[:length] for name in documents[0]}
        return {name: values.astype(np.float32 if name == "loss_mask" else np.int32) for name, values in row.items()}

    def prompt(self, kind: str, length: int, last: int, place: float | None = None) -> Prompt:
        """Return a prompt of `length` tokens with the last position `last`.

        The key is at the share `place` of the filler, or at a random place.
        """
        statement, question = self.key()
        filler = length - len(statement) - len(question)
        before = int((self._draws.random() if place is None else place) * filler)
        pieces = [*self.filler(before), statement, *self.filler(filler - before), question]
        positions = self._positions(pieces, last + 1)
        positions = positions + (last - positions[-1])
        return Prompt(kind, np.concatenate(pieces).astype(np.int32), positions, float(positions[before]) / last)

    def _positions(self, pieces: Sequence[Sequence[int]], extended: int) -> np.ndarray:
        """Return ascending positions, int32 `[tokens]`, below `extended`; most skipped positions are before a few pieces."""
        lengths = [len(piece) for piece in pieces]
        shares = self._draws.dirichlet(np.full(len(pieces) + 1, 0.1))[:-1]  # the last share is skipped after the end
        skipped = np.cumsum(shares * max(extended - sum(lengths), 0)).astype(np.int32)
        return np.arange(sum(lengths), dtype=np.int32) + np.repeat(skipped, lengths)


def answers() -> list[str]:
    """Return the sentences of the answers of the default data."""
    rows = [json.loads(line) for line in Path(PLAIN_ANSWERS).read_text(encoding="utf-8").splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    return [line.split(": ", 1)[-1] for text in texts for line in text.splitlines() if line]
