"""The device's side of the engine: a model, what its programs keep on the device, and the calls of the programs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.serve import programs
from qlora_jax.serve.interfaces import Adapters
from qlora_jax.serve.programs import Chunk, DeviceState
from qlora_jax.serve.row_sampling import Drawn, RowSettings, all_allowed, empty_memory
from qlora_jax.serve.scheduler import Limits

__all__ = ["Device"]


class Device:
    """A model and the state of its programs; the methods start programs and do not wait for them.

    Attributes:
        unused: the position for rows that take no part in a step: the last slot of the cache, which is of no text.
        settings: how the tokens of each row are drawn.
        all_allowed: the mask that allows every token.
    """

    def __init__(self, graphdef: nnx.GraphDef[Any], state: Any, limits: Limits, vocabulary: int, adapters: Adapters) -> None:
        """Create empty rows; see `Engine` for the arguments."""
        rows = limits.rows
        # A chunk that begins in the last slot of a text ends before the last slot.
        self._capacity = capacity = limits.capacity + limits.chunk
        self._graphdef, self._model, self._limits, self._vocabulary = graphdef, state, limits, vocabulary
        self._adapters, self.unused = adapters, capacity - 1
        self._state = jax.jit(
            lambda state: DeviceState(
                nnx.merge(graphdef, state).init_cache(rows, capacity),
                jnp.zeros((rows, vocabulary), jnp.float32),
                empty_memory(rows, vocabulary),
            )
        )(state)
        self.settings: RowSettings = jax.device_put(RowSettings.of([None] * rows, vocabulary))
        self.all_allowed = jax.device_put(all_allowed(rows, vocabulary))

    def install_adapters(self) -> None:
        """Write the adapters that were acquired into their slots."""
        self._model = self._adapters.install(self._model)

    def prefill(self, tokens: list[int], start: int, *, row: int, length: int, slot: int) -> None:
        """Process a part of a row's text that begins at a position; `length` is that of the whole text."""
        shape, count = (1, self._limits.chunk), len(tokens)
        ids, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        ids[0, :count], positions[0, :count] = tokens, np.arange(start, start + count)
        chunk = Chunk(
            ids, positions, np.asarray(row, np.int32), np.asarray([length], np.int32), np.asarray([slot], np.int32)
        )
        fixed = {"capacity": self._capacity, "banked": self._adapters.banked}
        self._state = programs.prefill_chunk(self._graphdef, self._model, self._state, chunk, **fixed)

    def decode(self, positions: np.ndarray, active: np.ndarray, adapter_ids: np.ndarray) -> None:
        """Process the token that each active row drew last."""
        arrays, banked = (positions, active, adapter_ids), self._adapters.banked
        self._state = programs.decode_rows(self._graphdef, self._model, self._state, *arrays, banked=banked)

    def draw(self, steps: np.ndarray, active: np.ndarray, allowed: Any) -> Drawn:
        """Draw a token for each active row."""
        drawn, self._state = programs.sample_rows(self._state, self.settings, steps, active, allowed)
        return drawn

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
        rows = self._limits.rows
        nobody, zeros = np.zeros(rows, bool), np.zeros(rows, np.int32)
        self._model = self._adapters.warm_up(self._model)
        self.prefill([0], 0, row=0, length=1, slot=0)
        self.decode(np.full(rows, self.unused, np.int32), nobody, zeros)
        self.draw(zeros, nobody, self.all_allowed)
        self.begin_row(0, [], [], {})
        self.copy_row(0, 0)
        jax.block_until_ready(self._state)
