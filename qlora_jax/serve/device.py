"""The device's side of the engine: a model, what its programs keep on the device, and the calls of the programs."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.serve import programs
from qlora_jax.serve.generate import LengthDependent
from qlora_jax.serve.interfaces import Adapters
from qlora_jax.serve.programs import Chunk, Tokens
from qlora_jax.serve.row_sampling import Drawn, Draws, RowSettings, all_allowed
from qlora_jax.serve.scheduler import SHORT, Limits

__all__ = ["Device", "Piece"]


_LEAST_REACH = 128  # tokens; reading fewer keys and values saves little


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a row's text.

    Attributes:
        tokens: the tokens.
        start: the position of the first one.
        row: the row.
        length: the number of tokens of the whole text.
        slot: that of the text's adapter.
    """

    tokens: Sequence[int]
    start: int
    row: int
    length: int
    slot: int


class Device:
    """A model and the state of its programs; the methods start programs and do not wait for them.

    Attributes:
        settings: how the tokens of each row are drawn.
        together: the numbers of rows for which there is a program that processes at most `scheduler.SHORT` tokens of each
            one's prompt at a time, within the first `least_reach` tokens of their texts; as few as fit into a chunk.
        least_reach: the number of first tokens of a row that the programs for the shortest texts read.
    """

    def __init__(self, graphdef: nnx.GraphDef[Any], state: Any, limits: Limits, vocabulary: int, adapters: Adapters) -> None:
        """Create empty rows; see `Engine` for the arguments."""
        rows = limits.rows
        # A chunk that begins in the last slot of a text ends before the last slot.
        self._capacity = capacity = limits.capacity + limits.chunk
        self._graphdef, self._model, self._limits, self._vocabulary = graphdef, state, limits, vocabulary
        self._adapters = adapters
        self._rows, self._reaches = programs.buckets(1, rows), programs.buckets(_LEAST_REACH, capacity)
        model = nnx.merge(graphdef, state)
        alike = not (isinstance(model, LengthDependent) and model.cache_lasts(1) is not None)
        fitting = [size for size in self._rows if size * SHORT <= limits.chunk] if limits.chunk > SHORT else []
        self.together, self.least_reach = tuple(fitting if alike else ()), self._reaches[0]
        empty = partial(programs.empty_state, rows=rows, capacity=capacity, vocabulary=vocabulary)
        self._state = jax.jit(lambda state: empty(nnx.merge(graphdef, state)))(state)
        self.settings: RowSettings = jax.device_put(RowSettings.of([None] * rows, vocabulary))
        self._all_allowed = {size: jax.device_put(all_allowed(size, vocabulary)) for size in self._rows}

    def install_adapters(self) -> None:
        """Write the adapters that were acquired into their slots."""
        self._model = self._adapters.install(self._model)

    def prefill(self, piece: Piece) -> None:
        """Process a part of one row's text, at most `Limits.chunk` tokens."""
        reach = _fitting(self._reaches, piece.start + len(piece.tokens))
        self._prefill([piece], 1, self._limits.chunk, reach)

    def prefill_together(self, pieces: Sequence[Piece]) -> None:
        """Process parts of several rows' texts, of at most `scheduler.SHORT` tokens each; see `together`."""
        self._prefill(pieces, _fitting(self.together, len(pieces)), SHORT, self.least_reach)

    def decode(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """Process the token that each of some rows drew last; each is (row, position of the token, slot of its adapter)."""
        self._decode(rows, _fitting(self._rows, len(rows)), _fitting(self._reaches, max(row[1] for row in rows) + 1))

    def draw(self, rows: Sequence[tuple[int, int]], allowed: Mapping[int, np.ndarray]) -> tuple[list[int], Drawn]:
        """Draw a token for each of some rows; return (the place of each of them in what was drawn, what was drawn).

        Args:
            rows: each is (the row, the number of the token in its answer).
            allowed: the tokens that may be drawn, by row, int32 `[ceil(v / 32)]`; any for the other rows.
        """
        return self._draw(rows, allowed, _fitting(self._rows, len(rows)))

    def begin_row(self, row: int, prompt: list[int], answer: list[int], bias: Mapping[int, float]) -> None:
        """Set what sampling remembers of a row's text."""
        counts = np.bincount(np.asarray(answer, np.int32), minlength=self._vocabulary).astype(np.int32)
        in_prompt, added = np.zeros(self._vocabulary, bool), np.zeros(self._vocabulary, np.float32)
        in_prompt[prompt] = True
        added[list(bias)] = list(bias.values())
        self._state = programs.begin_row(self._state, np.int32(row), counts, in_prompt, added)

    def copy_row(self, source: int, target: int) -> None:
        """Give a row the keys and values of another one."""
        self._state = programs.copy_row(self._state, np.int32(source), np.int32(target))

    def warm_up(self) -> None:
        """Compile all programs by running each once, for rows without texts."""
        self._model = self._adapters.warm_up(self._model)
        for reach in self._reaches:
            self._prefill([], 1, self._limits.chunk, reach)
            for size in self._rows:
                self._decode((), size, reach)
        for size in self.together:
            self._prefill([], size, SHORT, self.least_reach)
        for size in self._rows:
            self._draw((), {}, size)
        self.begin_row(0, [], [], {})
        self.copy_row(0, 0)
        jax.block_until_ready(self._state)

    def _prefill(self, pieces: Sequence[Piece], size: int, width: int, reach: int) -> None:
        """Process pieces by the program for `size` rows and at most `width` tokens of each."""
        ids, positions = np.zeros((size, width), np.int32), np.full((size, width), -1, np.int32)
        rows, adapter_ids = np.full(size, self._limits.rows, np.int32), np.zeros(size, np.int32)
        lengths = np.ones(size, np.int32)
        positions[len(pieces) :] = np.arange(self._capacity - width, self._capacity)
        for place, piece in enumerate(pieces):
            count = len(piece.tokens)
            ids[place, :count], positions[place, :count] = piece.tokens, np.arange(piece.start, piece.start + count)
            rows[place], adapter_ids[place], lengths[place] = piece.row, piece.slot, piece.length
        chunk = Chunk(ids, positions, rows, lengths, adapter_ids)
        fixed = {"capacity": self._capacity, "reach": reach, "banked": self._adapters.banked}
        self._state = programs.prefill_chunk(self._graphdef, self._model, self._state, chunk, **fixed)

    def _decode(self, rows: Sequence[tuple[int, int, int]], size: int, reach: int) -> None:
        numbers, places = self._places([row[0] for row in rows], size)
        positions, adapter_ids = np.full(size, self._capacity - 1, np.int32), np.zeros(size, np.int32)
        for place, (_, position, slot) in zip(places, rows, strict=True):
            positions[place], adapter_ids[place] = position, slot
        tokens, fixed = Tokens(numbers, positions, adapter_ids), {"reach": reach, "banked": self._adapters.banked}
        self._state = programs.decode_rows(self._graphdef, self._model, self._state, tokens, **fixed)

    def _draw(
        self, rows: Sequence[tuple[int, int]], allowed: Mapping[int, np.ndarray], size: int
    ) -> tuple[list[int], Drawn]:
        numbers, places = self._places([row[0] for row in rows], size)
        steps, masks = np.zeros(size, np.int32), all_allowed(size, self._vocabulary) if allowed else None
        for place, (row, step) in zip(places, rows, strict=True):
            steps[place] = step
            if masks is not None and row in allowed:
                masks[place] = allowed[row]
        draws = Draws(numbers, steps, self._all_allowed[size] if masks is None else masks)
        drawn, self._state = programs.sample_rows(self._state, self.settings, draws)
        return places, drawn

    def _places(self, rows: Sequence[int], size: int) -> tuple[np.ndarray, list[int]]:
        """Return (the rows of the entries of a program of this size, the entry of each row)."""
        places = list(rows) if size == self._limits.rows else list(range(len(rows)))
        numbers = np.full(size, self._limits.rows, np.int32)
        numbers[places] = rows
        return numbers, places


def _fitting(sizes: Sequence[int], least: int) -> int:
    """Return the smallest of the sizes that is large enough."""
    return next(size for size in sizes if size >= least)
