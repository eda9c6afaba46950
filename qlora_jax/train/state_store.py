"""Checkpoints of a run in progress, through Orbax: everything that the next step depends on.

    <folder>/<step>/state/        step, adapter, optimizer state and seed, each leaf under its path
    <folder>/<step>/data/         position of the data iterator, as JSON
    <folder>/<step>/checksums/    the CRC-32 of the bytes of each leaf and of the position, as JSON

A checkpoint appears under its step's name only when it is complete, so that a run that is killed while it saves resumes from
the one before. Restored leaves get the shardings of the running program, host memory included.

The files themselves would restore a flipped byte of a value as another value. Therefore each value is compared with its
checksum. Checkpoints of earlier versions have no checksums and are restored without that comparison, and leaves are found
under the names that earlier versions gave to their modules.
"""

import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.errors import CheckpointError, list_names, shortened

T = TypeVar("T")
_CHECKSUMS = "checksums"
_UNFINISHED = "*.orbax-checkpoint-tmp*"  # the names that Orbax gives to what it has not completed
_POSITION = "the position in the data"
_EARLIER = {"query_key_value": "qkv_proj"}  # the names of modules in checkpoints of earlier versions


def latest_step(folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint in a folder, without opening it; None: there is none."""
    return max((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal()), default=None)


class StateStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int, create: bool = True) -> None:
        """Open a folder of checkpoints, in which only the newest `keep` remain.

        Args:
            folder: the folder. No other process may write to it.
            keep: the number of checkpoints to keep.
            create: whether to make the folder, and to remove what a killed run left there half written; otherwise nothing
                is changed until a checkpoint is saved.

        Raises:
            CheckpointError: a file in the folder is damaged.
        """
        # Of several processes one alone has the store (`shared_store`), and waits for no others.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix=folder.name
        )
        several = jax.process_count() > 1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=create and not several,  # Orbax would make the folder together with the other processes
            enable_async_checkpointing=False,
            **({"multiprocessing_options": alone} if several else {}),
        )
        self._folder = folder
        if create:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
        try:
            with _without_tracebacks():
                self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        except OSError:
            raise
        except Exception as error:  # damaged files make Orbax raise errors of many kinds
            step = latest_step(folder)
            raise CheckpointError(
                f"{folder}: cannot be opened: {shortened(_reason(error), 300)}; delete {folder / str(step)} to go on "
                "without it"
            ) from error

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_position: dict[str, Any]) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: the checkpoint could not be written (full disk, no permission); older checkpoints are untouched.
        """
        leaves = {name: np.asarray(jax.device_get(leaf)) for name, leaf in _named_leaves(state).items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            data=ocp.args.JsonSave(data_position),
            **{_CHECKSUMS: ocp.args.JsonSave(_checksums(leaves, data_position))},
        )
        size = sum(leaf.nbytes for leaf in leaves.values())
        try:
            if (free := shutil.disk_usage(self._folder).free) < size:
                raise OSError(f"it needs {size:,} bytes, and {free:,} are free")
            with _without_tracebacks():
                self._manager.save(step, args=items, force=True)
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            self._remove_unfinished()
            latest = self.latest_step()
            others = "no checkpoint was saved before" if latest is None else f"that of step {latest} is intact"
            raise CheckpointError(
                f"{self._folder}: cannot save the checkpoint of step {step} ({_reason(error)}); {others}"
            ) from error

    def position(self) -> dict[str, Any]:
        """Return the position in the data of the newest checkpoint.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        step, found, checksums = self._read(data=ocp.args.JsonRestore())
        self._compare(step, _checksums({}, found["data"]), checksums and {_POSITION: checksums.get(_POSITION)})
        return found["data"]

    def restore(self, like: T) -> tuple[T, dict[str, Any]]:
        """Return (state, position in the data) of the newest checkpoint, with the structure and the shardings of `like`.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or it has other leaves, shapes or dtypes.
        """
        # No template is given: with one, Orbax returns arrays of other shapes as they are, and converts other dtypes.
        step, restored, checksums = self._read(state=ocp.args.StandardRestore(), data=ocp.args.JsonRestore())
        named, found = _named_leaves(like), restored["state"]
        self._compare(step, _checksums(found, restored["data"]), checksums)
        found = _with_present_names(found, named)
        problems = [
            f"{name}: expected {_describe(named.get(name))}, found {_describe(found.get(name))}"
            for name in sorted(named.keys() | found.keys())
            if _describe(named.get(name)) != _describe(found.get(name))
        ]
        if problems:
            raise CheckpointError.of(f"{self._folder}: the checkpoint of step {step} is of another run", problems)
        leaves = [jax.device_put(found[name], leaf.sharding) for name, leaf in named.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["data"]

    def _read(self, **items: Any) -> tuple[int, Any, dict[str, int] | None]:
        """Return (step, items, checksums) of the newest checkpoint; checksums are None where it has none."""
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"{self._folder}: holds no checkpoint")
        has_checksums = (self._folder / str(step) / _CHECKSUMS).exists()
        if has_checksums:
            items[_CHECKSUMS] = ocp.args.JsonRestore()
        try:
            with _without_tracebacks():
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # damaged files make Orbax and its readers raise errors of many kinds
            raise self._damaged(step, _reason(error)) from error
        checksums = restored[_CHECKSUMS] if has_checksums else None
        if has_checksums and not isinstance(checksums, dict):
            raise self._damaged(step, f"expected the checksums of its values, found {checksums!r}")
        return step, restored, checksums

    def _compare(self, step: int, found: dict[str, int], expected: Mapping[str, int | None] | None) -> None:
        """Raise CheckpointError where values have other checksums than those that they were saved with."""
        if expected is None:
            return
        changed = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if changed:
            raise self._damaged(step, f"these are not the values that were saved: {list_names(changed)}")

    def _damaged(self, step: int, reason: str) -> CheckpointError:
        before = [other for other in self._manager.all_steps() if other < step]
        hint = f" (delete {self._folder / str(step)} to go on from step {max(before)})" if before else ""
        return CheckpointError(f"{self._folder}: cannot restore the checkpoint of step {step}: {reason}{hint}")

    def _remove_unfinished(self) -> None:
        for path in self._folder.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Close the folder."""
        self._manager.close()


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


def _checksums(leaves: dict[str, Any], position: dict[str, Any]) -> dict[str, int]:
    """Return the CRC-32 of each leaf's bytes, and of the position as JSON with sorted keys."""
    sums = {name: zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data) for name, leaf in leaves.items()}
    return {**sums, _POSITION: zlib.crc32(json.dumps(position, sort_keys=True).encode())}


def _reason(error: Exception) -> str:
    """Return what is wrong in one line. Orbax's messages hold the names of all its files and of its C++ sources."""
    text = " ".join(str(error).split())
    system = re.search(r"os_error_code='(\d+)'", text)
    return text if system is None else os.strerror(int(system[1]))


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Drop the tracebacks of Orbax's threads in the block, which log them; the error that they report is raised in it.

    After an error, threads of its library in C++ find the event loop of the block closed, and print that. They may do so at
    any later time, so that this message is dropped until the process ends.
    """
    logger = logging.getLogger("absl")

    def drop(record: logging.LogRecord) -> bool:
        return record.exc_info is None and record.levelno < logging.ERROR

    before = sys.unraisablehook
    logger.addFilter(drop)
    sys.unraisablehook = partial(_hook, before)
    try:
        yield
        sys.unraisablehook = before
    finally:
        logger.removeFilter(drop)


def _hook(before: Callable[[Any], object], unraisable: Any) -> None:
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        before(unraisable)
