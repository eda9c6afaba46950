"""The device's side of the engine: a model, what its programs keep on the device, and the calls of the programs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.serve import programs
from qlora_jax.serve.interfaces import Adapters
from qlora_jax.serve.programs import Chunk, DeviceState, Tokens
from qlora_jax.serve.row_sampling import Drawn, Draws, RowSettings, all_allowed, empty_memory
from qlora_jax.serve.scheduler import Limits

__all__ = ["Device"]


_LEAST_REACH = 128  # tokens; reading fewer keys and values saves little


class Device:
    """A model and the state of its programs; the methods start programs and do not wait for them.

    Attributes:
        settings: how the tokens of each row are drawn.
    """

    def __init__(self, graphdef: nnx.GraphDef[Any], state: Any, limits: Limits, vocabulary: int, adapters: Adapters) -> None:
        """Create empty rows; see `Engine` for the arguments."""
        rows = limits.rows
        # A chunk that begins in the last slot of a text ends before the last slot.
        self._capacity = capacity = limits.capacity + limits.chunk
        self._graphdef, self._model, self._limits, self._vocabulary = graphdef, state, limits, vocabulary
        self._adapters = adapters
        self._rows, self._reaches = programs.buckets(1, rows), programs.buckets(_LEAST_REACH, capacity)
        self._state = jax.jit(
            lambda state: DeviceState(
                nnx.merge(graphdef, state).init_cache(rows, capacity),
                jnp.zeros((rows, vocabulary), jnp.float32),
                empty_memory(rows, vocabulary),
            )
        )(state)
        self.settings: RowSettings = jax.device_put(RowSettings.of([None] * rows, vocabulary))
        self._all_allowed = {size: jax.device_put(all_allowed(size, vocabulary)) for size in self._rows}

    def install_adapters(self) -> None:
        """Write the adapters that were acquired into their slots."""
        self._model = self._adapters.install(self._model)

    def prefill(self, tokens: list[int], start: int, *, row: int, length: int, slot: int) -> None:
        """Process a part of a row's text that begins at a position; `length` is that of the whole text."""
        reach = _fitting(self._reaches, start + len(tokens))
        self._prefill(tokens, start, row=row, length=length, slot=slot, reach=reach)

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
            self._prefill([0], 0, row=0, length=1, slot=0, reach=reach)
            for size in self._rows:
                self._decode((), size, reach)
        for size in self._rows:
            self._draw((), {}, size)
        self.begin_row(0, [], [], {})
        self.copy_row(0, 0)
        jax.block_until_ready(self._state)

    def _prefill(self, tokens: list[int], start: int, *, row: int, length: int, slot: int, reach: int) -> None:
        shape, count = (1, self._limits.chunk), len(tokens)
        ids, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        ids[0, :count], positions[0, :count] = tokens, np.arange(start, start + count)
        chunk = Chunk(
            ids, positions, np.asarray(row, np.int32), np.asarray([length], np.int32), np.asarray([slot], np.int32)
        )
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
