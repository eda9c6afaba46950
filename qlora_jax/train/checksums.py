"""Checksums of a checkpoint: the CRC-32 of the bytes of each leaf and of the position in the data, as a JSON file.

They are computed in the thread of Orbax that writes them, while the training goes on.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

__all__ = ["POSITION", "Checksums", "checksums"]

POSITION = "the position in the data"
_FILE = "metadata"  # the name that Orbax gives to a JSON file


def checksums(leaves: Mapping[str, Any], position: dict[str, Any]) -> dict[str, int]:
    """Return the CRC-32 of each leaf's bytes, and that of the position as JSON with sorted keys."""
    sums = {name: zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data) for name, leaf in leaves.items()}
    return {**sums, POSITION: zlib.crc32(json.dumps(position, sort_keys=True).encode())}


class ChecksumsHandler(ocp.JsonCheckpointHandler):
    """Orbax's handler of the file; it reads the file as any other JSON."""

    async def async_save(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, directory: Path, item: Any = None, args: "Checksums | None" = None
    ) -> list[Future]:
        """Start to compute and to write the checksums, and return what waits for the end."""
        assert args is not None
        return [CommitFutureAwaitingContractedSignals(self._write(directory, args), name="checksums")]

    async def _write(self, directory: Path, args: "Checksums") -> None:
        (directory / _FILE).write_text(json.dumps(checksums(args.leaves, args.position)))


@ocp.args.register_with_handler(ChecksumsHandler, for_save=True, for_restore=True)
@dataclass
class Checksums(ocp.args.CheckpointArgs):
    """What the checksums are of; nothing where they are read.

    Attributes:
        leaves: arrays by name. They must not change while they are saved.
        position: the position in the data.
    """

    leaves: Mapping[str, np.ndarray] = field(default_factory=dict)
    position: dict[str, Any] = field(default_factory=dict)
