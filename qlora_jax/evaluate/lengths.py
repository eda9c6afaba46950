"""Batches of few shapes from rows of tokens of any length.

Rows are grouped by the lengths 128, 256, 512 … and padded on the right, where no earlier token attends to the padding. All
batches have the same number of rows, so that a program is compiled once for each length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SHORTEST = 128


class PaddedBatch(NamedTuple):
    """A batch of padded rows.

    Attributes:
        indices: indices of the rows in the original sequence.
        tokens: int32 `[batch_size, t]`.
        lengths: int32 `[batch_size]`, the number of tokens of each row; 1 for rows that only fill the batch.
    """

    indices: list[int]
    tokens: np.ndarray
    lengths: np.ndarray


def padded_batches(rows: Sequence[np.ndarray], batch_size: int) -> list[PaddedBatch]:
    """Return batches that together contain all rows int32 `[t_i]`, the shortest rows first."""
    by_length: dict[int, list[int]] = {}
    for index, tokens in enumerate(rows):
        by_length.setdefault(padded_length(len(tokens)), []).append(index)
    batches = []
    for length, indices in sorted(by_length.items()):
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            tokens, lengths = np.zeros((batch_size, length), np.int32), np.ones(batch_size, np.int32)
            for row, index in enumerate(chosen):
                lengths[row] = len(rows[index])
                tokens[row, : lengths[row]] = rows[index]
            batches.append(PaddedBatch(chosen, tokens, lengths))
    return batches


def padded_length(length: int) -> int:
    """Return the next power of two, at least 128."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())
