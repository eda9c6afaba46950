"""Checkpoints of a run in progress, through Orbax: everything that the next step depends on.

    <folder>/<step>/state/        step, adapter, optimizer state and seed, each leaf under its path
    <folder>/<step>/data/         position of the data iterator, as JSON
    <folder>/<step>/checksums/    the CRC-32 of the bytes of each leaf and of the position, as JSON
    <folder>/damaged-<step>/      a checkpoint that could not be restored

A checkpoint appears under its step's name only when it is complete, so that a run that is killed while it saves resumes from
the one before. The leaves are saved as whole arrays, whatever devices they were spread over, and restored leaves get the
shardings of the running program, host memory included: a run may go on with another mesh.

`save` copies the leaves to the host and returns. Threads of Orbax then compute the checksums and write the files, while the
next steps change the arrays on the devices.

The files themselves would restore a flipped byte of a value as another value. Therefore each value is compared with its
checksum. A damaged checkpoint is put aside, and the one before is restored in its place. Checkpoints of earlier versions
have no checksums and are restored without that comparison, and leaves are found under the names that earlier versions gave
to their modules.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.errors import CheckpointError, list_names, shortened
from qlora_jax.train.checksums import POSITION, Checksums, checksums
from qlora_jax.train.orbax_messages import without_messages

T = TypeVar("T")
_CHECKSUMS = "checksums"
_UNFINISHED = "*.orbax-checkpoint-tmp*"  # the names that Orbax gives to what it has not completed
_DAMAGED = "damaged-"
_EARLIER = {"query_key_value": "qkv_proj"}  # the names of modules in checkpoints of earlier versions
_logger = logging.getLogger(__name__)


class _DamagedError(CheckpointError):
    """The files of a checkpoint cannot be read, or hold other values than those that were saved."""


def latest_step(folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint in a folder, without opening it; None: there is none."""
    return max(_steps(folder), default=None)


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal())


class StateStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int, create: bool = True, reuse: bool = True) -> None:
        """Open a folder of checkpoints, in which only the newest `keep` remain.

        Args:
            folder: the folder. No other process may write to it.
            keep: the number of checkpoints to keep.
            create: whether to make the folder, and to remove what a killed run left there half written; otherwise nothing
                is changed until a checkpoint is saved.
            reuse: whether the copy of a state that lies in host memory stays there for the next one to be copied into, which
                takes a fraction of the time; otherwise it is freed when it is written.
        """
        # lightweight_initialize: else Orbax would read a file of each checkpoint, which is not used here and may be damaged.
        options: dict[str, Any] = {"max_to_keep": keep, "create": create, "lightweight_initialize": True}
        if jax.process_count() > 1:  # one of them alone has the store (`shared_store`), and waits for no others
            alone = ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix=folder.name
            )
            options |= {"multiprocessing_options": alone, "create": False, "enable_async_checkpointing": False}
        self._options = ocp.CheckpointManagerOptions(**options)
        self._folder, self._may_change = folder, create
        self._saving: int | None = None  # the step of the checkpoint that is being written
        self._quiet = ExitStack()
        self._copies: dict[str, np.ndarray] = {}  # of leaves in host memory
        self._reuse = reuse
        if create:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        with without_messages():
            return ocp.CheckpointManager(self._folder.absolute(), options=self._options)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None. One that is being written is not complete."""
        return latest_step(self._folder)

    def save(self, step: int, state: Any, data_position: dict[str, Any]) -> None:
        """Copy a state, and start to write it as a checkpoint; `wait` waits for the end.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written (full disk, no permission); older
                checkpoints are untouched.
        """
        self.wait()
        named = _named_leaves(state)
        leaves = _copied_to_host(named, self._copies)
        # A device's leaves get new memory each time. Their copies are freed when they are written.
        self._copies = {name: leaves[name] for name, leaf in named.items() if self._reuse and _is_on_host(leaf)}
        position = json.loads(json.dumps(data_position))  # the batches may change theirs
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            data=ocp.args.JsonSave(position),
            **{_CHECKSUMS: Checksums(leaves, position)},
        )
        size = sum(leaf.nbytes for leaf in leaves.values())
        self._saving = step
        self._quiet.enter_context(without_messages())
        try:
            if (free := shutil.disk_usage(self._folder).free) < size:
                raise OSError(f"it needs {size:,} bytes, and {free:,} are free")
            self._manager.save(step, args=items, force=True)
        except (OSError, ValueError) as error:
            raise self._not_saved(error) from error

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            CheckpointError: it could not be written (full disk, no permission); older checkpoints are untouched.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._not_saved(error) from error
        self._saving = None
        self._quiet.close()

    def position(self) -> dict[str, Any]:
        """Return the position in the data of the newest checkpoint that is whole. Nothing is changed.

        Raises:
            CheckpointError: there is no checkpoint, or all are damaged.
        """

        def read(step: int) -> dict[str, Any]:
            found, expected = self._read(step, data=ocp.args.JsonRestore())
            self._compare(step, checksums({}, found["data"]), expected and {POSITION: expected.get(POSITION)})
            return found["data"]

        return self._newest_whole(read)[0]

    def restore(self, like: T) -> tuple[T, dict[str, Any]]:
        """Return (state, position in the data) of the newest checkpoint, with the structure and the shardings of `like`.

        See `read` for damaged checkpoints and errors.
        """
        state, position = self.read(like)
        return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, like), position

    def read(self, like: T) -> tuple[T, dict[str, Any]]:
        """Return (state, position in the data) of the newest checkpoint, with NumPy arrays in the structure of `like`.

        If it is damaged, it is put aside with a warning, and the one before takes its place. Afterwards `latest_step` is the
        step of the checkpoint that was restored.

        Raises:
            CheckpointError: there is no checkpoint, all are damaged, or the newest that is whole has other leaves, shapes or
                dtypes.
        """

        def read(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
            # No template is given: with one, Orbax returns arrays of other shapes as they are, and converts other dtypes.
            restored, expected = self._read(step, state=ocp.args.StandardRestore(), data=ocp.args.JsonRestore())
            self._compare(step, checksums(restored["state"], restored["data"]), expected)
            return restored["state"], restored["data"]

        self.wait()
        (found, position), step, damaged = self._newest_whole(read)
        named = _named_leaves(like)
        found = _with_present_names(found, named)
        problems = [
            f"{name}: expected {_describe(named.get(name))}, found {_describe(found.get(name))}"
            for name in sorted(named.keys() | found.keys())
            if _describe(named.get(name)) != _describe(found.get(name))
        ]
        if problems:
            raise CheckpointError.of(f"{self._folder}: the checkpoint of step {step} is of another run", problems)
        self._put_aside(damaged, step)
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in named]), position

    def close(self) -> None:
        """Close the folder, after the last checkpoint is complete; a warning says if it could not be written."""
        try:
            self.wait()
        except CheckpointError as error:
            _logger.warning("%s", error)
        self._manager.close()

    def _newest_whole(self, read: Callable[[int], T]) -> tuple[T, int, dict[int, _DamagedError]]:
        """Return (result, step, errors of newer checkpoints by step) of the newest checkpoint that `read` can read.

        Raises:
            CheckpointError: there is no checkpoint, or all are damaged.
        """
        damaged: dict[int, _DamagedError] = {}
        for step in reversed(_steps(self._folder)):
            try:
                return read(step), step, damaged
            except _DamagedError as error:
                damaged[step] = error
        if not damaged:
            raise CheckpointError(f"{self._folder}: holds no checkpoint")
        first = next(iter(damaged.values()))
        others = "no other is there" if len(damaged) == 1 else "all others are damaged, too"
        raise CheckpointError(f"{first}; {others}; delete {self._folder} to begin anew") from first

    def _put_aside(self, damaged: Mapping[int, _DamagedError], restored: int) -> None:
        """Rename damaged checkpoints, in whose place others are written, and say which one is restored."""
        for step, error in damaged.items():
            if not self._may_change:
                _logger.warning("%s; the one of step %d is read in its place.", error, restored)
                continue
            aside = self._folder / f"{_DAMAGED}{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)
            _logger.warning("%s; it is now %s, and the one of step %d is restored.", error, aside, restored)
        if damaged and self._may_change:  # Orbax remembers the steps that it found
            self._manager.close()
            self._manager = self._open()

    def _read(self, step: int, **items: Any) -> tuple[Any, dict[str, int] | None]:
        """Return (items, checksums) of a checkpoint; checksums are None where it has none.

        Raises:
            _DamagedError: it cannot be read.
        """
        has_checksums = (self._folder / str(step) / _CHECKSUMS).exists()
        if has_checksums:
            items[_CHECKSUMS] = Checksums()
        try:
            with without_messages():
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # damaged files make Orbax and its readers raise errors of many kinds
            raise self._damaged(step, shortened(_reason(error), 300)) from error
        found = restored[_CHECKSUMS] if has_checksums else None
        if has_checksums and not isinstance(found, dict):
            raise self._damaged(step, f"expected the checksums of its values, found {found!r}")
        return restored, found

    def _compare(self, step: int, found: dict[str, int], expected: Mapping[str, int | None] | None) -> None:
        """Raise _DamagedError where values have other checksums than those that they were saved with."""
        if expected is None:
            return
        changed = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if changed:
            raise self._damaged(step, f"these are not the values that were saved: {list_names(changed)}")

    def _damaged(self, step: int, reason: str) -> _DamagedError:
        return _DamagedError(f"{self._folder}: cannot restore the checkpoint of step {step}: {reason}")

    def _not_saved(self, error: Exception) -> CheckpointError:
        """Return the error for the checkpoint that is being written, and remove what there is of it."""
        step, self._saving = self._saving, None
        self._quiet.__exit__(type(error), error, None)
        self._remove_unfinished()
        latest = self.latest_step()
        others = "no checkpoint was saved before" if latest is None else f"that of step {latest} is intact"
        return CheckpointError(f"{self._folder}: cannot save the checkpoint of step {step} ({_reason(error)}); {others}")

    def _remove_unfinished(self) -> None:
        for path in self._folder.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by their paths, in the order of the tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _with_present_names(found: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves that were found, by the names of the leaves that are expected where they have an earlier name."""
    present = {".".join(_EARLIER.get(part, part) for part in name.split(".")): name for name in named}
    return {name if name in named else present.get(name, name): leaf for name, leaf in found.items()}


def _describe(leaf: Any) -> str:
    return "none" if leaf is None else f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"


class _OwnArray(np.ndarray):
    """An array that nothing changes, so that Orbax, which copies arrays by `copy.deepcopy`, need not copy it once more."""

    def __deepcopy__(self, memo: Any) -> "_OwnArray":
        return self


def _copied_to_host(leaves: Mapping[str, Any], copies: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return copies of leaves that nothing changes. What `device_get` returns of host memory may be the memory itself.

    Args:
        leaves: arrays by name.
        copies: those of the last checkpoint, whose memory is used again: new memory takes several times as long to fill.
    """
    found, copied = jax.device_get(dict(leaves)), {}
    for name, leaf in leaves.items():
        value, before = found[name], copies.get(name)
        if _is_on_host(leaf):
            fits = before is not None and (before.shape, before.dtype) == (value.shape, value.dtype)
            copy = before if before is not None and fits else np.empty_like(value)
            np.copyto(copy, value)
            value = copy
        copied[name] = value.view(_OwnArray)
    return copied


def _is_on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return "host" in str(leaf.sharding.memory_kind) or any(device.platform == "cpu" for device in leaf.devices())


def _reason(error: Exception) -> str:
    """Return what is wrong in one line. Orbax's messages hold the names of all its files and of its C++ sources."""
    text = " ".join(str(error).split())
    system = re.search(r"os_error_code='(\d+)'", text)
    return text if system is None else os.strerror(int(system[1]))
