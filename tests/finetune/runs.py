"""Helpers of the tests of runs: options with changes, the rows of a run, and what a finished run left."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_jax.finetune import Options

TIMING = ("tokens_per_second", "peak_memory_bytes", "goodput")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that was made once a session. Tests only read it.

    Attributes:
        options: its options.
        folder: what it returned.
        out, errors: what it printed.
        steps: which steps it lowered, and whether the thread that precompiles did (lowered.py).
    """

    options: Options
    folder: Path
    out: str
    errors: str
    steps: list[tuple[str, bool]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of its log."""
        return rows_of(self.options.run.output)


def but(options: Options, group: str, **fields: Any) -> Options:
    """Return the options with other values of some fields of a group."""
    return dataclasses.replace(options, **{group: dataclasses.replace(getattr(options, group), **fields)})


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Return the rows of a run that are whole; a kill may cut the last one."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def without_timing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without what differs from one run to the next."""
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]
