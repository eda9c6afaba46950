"""Texts that hide a key in filler and ask for it, as tokens with positions that may have gaps.

    ... filler | The pass key is 48213. Remember it. | filler ... | What is the pass key? The pass key is 48213

Of the positions up to the one where a text may end, a short text skips most: shares of them, drawn at random, lie before its
pieces (sentences), most of them before a few. The order stays, as in PoSE (Zhu et al. 2023).
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.data import PLAIN_ANSWERS

DIGITS = 5  # of a key
OTHERS = 0.03  # weight in training of a token that is no digit of an answer
DEPTHS = ("first third", "middle", "last third")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text that asks for a key.

    Attributes:
        kind: "within", "beyond" or "real".
        tokens: int32 `[t]`, the digits of the answer at the end.
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
        """(the sentences that tell a key, those that ask for it, with the answer)."""
        digits = "".join(map(str, self._draws.integers(0, 10, DIGITS)))
        told = self._encode(f" The pass key is {digits}. Remember it.")
        question = " What is the pass key? The pass key is "
        asked = self._encode(question + digits)
        if asked[:-DIGITS] != self._encode(question):
            raise ValueError(
                f"model: expected a tokenizer that makes a token of each digit, found {asked[-DIGITS:]} for {digits}"
            )
        return told, asked

    def filler(self, count: int) -> Iterator[list[int]]:
        """Sentences of so many tokens together, of which the last is cut."""
        while count > 0:
            sentence = self._sentences[self._draws.integers(len(self._sentences))][:count]
            count -= len(sentence)
            yield sentence

    def row(self, length: int, extended: int, reach: int) -> dict[str, np.ndarray]:
        """A row of training, arrays `[length]`: packed documents, each with a key, at most `reach` tokens from where it is
        told to the end of the answer, and with positions of its own."""
        documents: list[dict[str, np.ndarray]] = []
        total = 0
        while total <= length:
            told, asked = self.key()
            between = int(self._draws.integers(reach - len(told) - len(asked) + 1))
            before = int(self._draws.integers(reach // 2))
            pieces = [*self.filler(before), told, *self.filler(between), asked]
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
        """A prompt of so many tokens whose last position is given, with its key at that share of the filler, or anywhere."""
        told, asked = self.key()
        filler = length - len(told) - len(asked)
        before = int((self._draws.random() if place is None else place) * filler)
        pieces = [*self.filler(before), told, *self.filler(filler - before), asked]
        positions = self._positions(pieces, last + 1)
        positions = positions + (last - positions[-1])
        return Prompt(kind, np.concatenate(pieces).astype(np.int32), positions, float(positions[before]) / last)

    def _positions(self, pieces: Sequence[Sequence[int]], extended: int) -> np.ndarray:
        """int32 `[tokens]` below `extended`, in order; what is skipped lies before pieces, most of it before a few."""
        lengths = [len(piece) for piece in pieces]
        shares = self._draws.dirichlet(np.full(len(pieces) + 1, 0.1))[:-1]  # the last share is left after the end
        skipped = np.cumsum(shares * max(extended - sum(lengths), 0)).astype(np.int32)
        return np.arange(sum(lengths), dtype=np.int32) + np.repeat(skipped, lengths)


def answers() -> list[str]:
    """The sentences of the answers that ship."""
    rows = [json.loads(line) for line in Path(PLAIN_ANSWERS).read_text(encoding="utf-8").splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    return [line.split(": ", 1)[-1] for text in texts for line in text.splitlines() if line]
