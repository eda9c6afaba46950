"""The checkpoints of a run of several processes.

Process 0 alone reads and writes the files, so that the folder need not be shared by the hosts. What it finds there, errors
included, goes to the other processes, and each places the values on its own devices. A state is small beside the frozen
weights, which are no part of it. The files are those of `StateStore`: a run goes on with another number of processes.
"""

from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from qlora_jax.nn.hosts import is_main, main_bytes, of_main, put, several, to_numpy, together
from qlora_jax.train.state_store import StateStore

__all__ = ["SharedStore", "open_store"]

T = TypeVar("T")


class SharedStore:
    """A `StateStore` of process 0. Every process calls the same methods in the same order, and gets the same results."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Open a folder of checkpoints in process 0; see `StateStore`.

        Raises:
            CheckpointError: a file in the folder is damaged.
            HostError: the same, in the other processes; so for all methods.
        """
        self._store: StateStore | None = None
        with together():
            if is_main():
                self._store = StateStore(folder, keep=keep)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return of_main(lambda: self._main.latest_step())

    def save(self, step: int, state: Any, data_position: dict[str, Any]) -> None:
        """Write a checkpoint; see `StateStore.save`."""
        state = jax.tree.map(to_numpy, state)  # where it is split over processes, all of them gather it
        with together():
            if is_main():
                self._main.save(step, state, data_position)
                self._main.wait()

    def wait(self) -> None:
        """Do nothing: `save` returns when the checkpoint is complete."""

    def restore(self, like: T) -> tuple[T, dict[str, Any]]:
        """Return (state, position in the data) of the newest checkpoint, with the structure and the shardings of `like`."""
        state: Any = like

        def read() -> dict[str, Any]:
            nonlocal state
            state, found = self._main.read(like)
            return found

        position: dict[str, Any] = of_main(read)

        def share(leaf: Any, like: Any) -> Any:
            value = leaf if is_main() else np.zeros(like.shape, like.dtype)
            data = main_bytes(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            return put(data.view(like.dtype).reshape(like.shape), like.sharding)

        return jax.tree.map(share, state, like), position

    def close(self) -> None:
        """Close the folder."""
        if self._store is not None:
            self._store.close()

    @property
    def _main(self) -> StateStore:
        assert self._store is not None
        return self._store


def open_store(folder: Path, *, keep: int) -> StateStore | SharedStore:
    """Return the checkpoints of a run in a folder, for the processes that it has; see `StateStore`."""
    return SharedStore(folder, keep=keep) if several() else StateStore(folder, keep=keep)
