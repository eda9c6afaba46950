"""Rows of tokens of any length in few shapes: sorted into lengths of 128, 256, 512 … and padded on the right, where no
earlier token sees it. A batch has always the same rows, so that a program is compiled once a length."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SHORTEST = 128


class PaddedBatch(NamedTuple):
    """Some of the rows.

    Attributes:
        indices: which they are.
        tokens: int32 `[batch_size, t]`; lengths: int32 `[batch_size]`, 1 for rows beyond the last.
    """

    indices: list[int]
    tokens: np.ndarray
    lengths: np.ndarray


def padded_batches(rows: Sequence[np.ndarray], batch_size: int) -> list[PaddedBatch]:
    """All rows, the shortest first."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(padded_length(len(row)), []).append(index)
    batches = []
    for length, indices in sorted(by_length.items()):
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            tokens, lengths = np.zeros((batch_size, length), np.int32), np.ones(batch_size, np.int32)
            for place, index in enumerate(chosen):
                lengths[place] = len(rows[index])
                tokens[place, : lengths[place]] = rows[index]
            batches.append(PaddedBatch(chosen, tokens, lengths))
    return batches


def padded_length(length: int) -> int:
    """The next power of two, at least 128."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())
