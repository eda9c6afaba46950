"""Checkpoints of a run in progress, through Orbax: everything that the next step depends on.

    <folder>/<step>/state/    step, adapter, optimizer state and seed, each leaf under its path
    <folder>/<step>/data/     position of the data iterator, as JSON

A checkpoint appears under its step's name only when it is complete, so that a run that is killed while it saves resumes from
the one before. Restored leaves get the shardings of the running program, host memory included.
"""

from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.errors import CheckpointError

T = TypeVar("T")


class StateStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Open or create a folder of checkpoints, in which only the newest `keep` remain."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_position: dict[str, Any]) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: the checkpoint could not be written (full disk, no permission); older checkpoints are untouched.
        """
        leaves = {name: np.asarray(jax.device_get(leaf)) for name, leaf in _named_leaves(state).items()}
        items = ocp.args.Composite(state=ocp.args.StandardSave(leaves), data=ocp.args.JsonSave(data_position))
        try:
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            latest = self.latest_step()
            others = "no checkpoint was saved before" if latest is None else f"that of step {latest} is intact"
            raise CheckpointError(
                f"{self._folder}: cannot save the checkpoint of step {step} ({error}); {others}"
            ) from error

    def restore(self, like: T) -> tuple[T, dict[str, Any]]:
        """Return (state, position in the data) of the newest checkpoint, with the structure and the shardings of `like`.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or it has other leaves, shapes or dtypes.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"{self._folder}: holds no checkpoint")
        # No template is given: with one, Orbax returns arrays of other shapes as they are, and converts other dtypes.
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:
            before = [other for other in self._manager.all_steps() if other < step]
            hint = f" (delete {self._folder / str(step)} to go on from step {max(before)})" if before else ""
            raise CheckpointError(f"{self._folder}: cannot restore the checkpoint of step {step}: {error}{hint}") from error
        named, found = _named_leaves(like), restored["state"]
        problems = [
            f"{name}: expected {_describe(named.get(name))}, found {_describe(found.get(name))}"
            for name in sorted(named.keys() | found.keys())
            if _describe(named.get(name)) != _describe(found.get(name))
        ]
        if problems:
            raise CheckpointError.of(f"{self._folder}: the checkpoint of step {step} is of another run", problems)
        leaves = [jax.device_put(found[name], leaf.sharding) for name, leaf in named.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["data"]

    def close(self) -> None:
        """Close the folder."""
        self._manager.close()


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by their paths, in the order of the tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _describe(leaf: Any) -> str:
    return "none" if leaf is None else f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"
