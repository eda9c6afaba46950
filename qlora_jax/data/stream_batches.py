"""Batches of a data set that is larger than memory: rows are read, tokenized and packed during training.

    rows      r0 r1 r2 …                                        a stream, read from start to end, repeatedly
    buffer    the next `buffer` rows, as examples               only these are in memory
    batches   those of batch.py for these examples: shuffled by (seed, pass, buffer), packed or padded

A buffer is used completely before the next one is read. So the position is small and exact: the start of this buffer's rows
(`RowStream.state_dict`, which finds it again without reading the files before it) and the number of the next batch.
Resuming reads and tokenizes one buffer again, and checks that its contents are the same. A sliding shuffle buffer, as in
`IterableDataset.shuffle`, would have to be saved completely.

The disadvantages: examples are shuffled only within a buffer, and the last batch of a buffer is filled with padding rows.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import grain
import numpy as np

from qlora_jax.data.batch import Batch, BatchIterator, batches
from qlora_jax.data.format import Example
from qlora_jax.data.streams import RowStream
from qlora_jax.errors import DataError, OptionError

Row = Any  # a row, or a `DamagedRow` in its place


def read_rows(rows: Iterable[Row], count: int, first: int, source: str) -> list[Row]:
    """Return the next rows, at most `count`.

    Args:
        rows: an iterator over rows.
        count: number of rows.
        first: number of the first row, for error messages.
        source: name of the data set, for error messages.

    Raises:
        DataError: the rows cannot be read.
    """
    try:
        return list(islice(rows, count))
    except DataError:
        raise
    except Exception as error:  # the readers of files and the network code in `datasets` raise many kinds of errors
        raise DataError(
            f"{source}, in the {count} rows from row {first} on (counted from 0): expected rows that can be read, "
            f"found {type(error).__name__}: {error}"
        ) from error


class StreamBatches(grain.DatasetIterator[Batch]):
    """An endless iterator over batches of a stream of rows, whose position can be saved; see the module's docstring.

    Args:
        open_rows: opens the stream at its start.
        encode: maps (rows, number of the first row) to examples of at most `length` + 1 tokens, possibly none.
        buffer: number of rows in memory at a time.
        batch_size, length, pad_id, packing, seed, group_by_length: as in `batches`.
        source: name of the stream, for error messages.
        first_row: number of the stream's first row, for `encode` and for error messages.
        pass_ended: called after the last row of each pass.

    Raises:
        OptionError: a buffer of less than one row, or other invalid options; see `batches`.
        DataError: while reading: rows that cannot be read, or a complete pass with nothing to learn.
    """

    def __init__(
        self,
        open_rows: Callable[[], RowStream],
        encode: Callable[[list[Row], int], list[Example]],
        *,
        buffer: int,
        batch_size: int,
        length: int,
        pad_id: int,
        packing: bool = False,
        seed: int = 0,
        group_by_length: bool = False,
        source: str = "stream",
        first_row: int = 0,
        pass_ended: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        if buffer < 1:
            raise OptionError(f"buffer: expected at least 1 row, found {buffer}")
        self._open_rows, self._encode, self._buffer, self._seed = open_rows, encode, buffer, seed
        self._source, self._first_row, self._pass_ended = source, first_row, pass_ended
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "length": length,
            "pad_id": pad_id,
            "packing": packing,
            "group_by_length": group_by_length,
        }
        self._pass = 0
        self._row = 0  # number of this buffer's first row within the pass
        self._read = 0  # number of rows of this buffer
        self._stream = open_rows()
        self._rows: Iterator[Row] | None = None
        self._start: dict[str, Any] = copy.deepcopy(
            self._stream.state_dict()
        )  # the stream's state at the start of this buffer
        self._current: BatchIterator | None = None

    def __next__(self) -> Batch:
        taught = self._pass  # the last pass that is known to have something to learn
        while True:
            if self._current is not None:
                batch = next(self._current, None)
                if batch is not None:
                    return batch
                taught = self._pass
            self._advance()
            if self._pass > taught + 1:
                raise DataError(
                    f"{self._source}: expected at least one row with something to learn, found none in a whole pass"
                )

    def batches_in_epoch(self, epoch: int = 0) -> None:
        """Return None: the number of batches is unknown before all rows are read."""
        return None

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as values that JSON can hold."""
        return {
            "pass": self._pass,
            "row": self._row,
            "buffer": self._buffer,
            "stream": copy.deepcopy(self._start),
            "batches": None if self._current is None else self._current.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            OptionError: the position was saved with another buffer or with other options.
            DataError: the position was saved with other data.
        """
        if state["buffer"] != self._buffer:
            raise OptionError(f"position of the data: expected a buffer of {state['buffer']} rows, found {self._buffer}")
        self._pass, self._row, self._read = int(state["pass"]), int(state["row"]), 0
        self._open(state["stream"])
        self._current = None
        if state["batches"] is not None:
            self._fill()
            if self._current is None:
                raise DataError("position of the data: expected the data that it was saved with, found nothing there")
            self._current.set_state(state["batches"])

    def _open(self, position: dict[str, Any] | None) -> None:
        self._stream, self._rows = self._open_rows(), None
        if position is not None:
            self._stream.load_state_dict(copy.deepcopy(position))
        self._start = copy.deepcopy(self._stream.state_dict() if position is None else position)

    def _advance(self) -> None:
        """Go to the next buffer, or to the start of the stream if it has ended."""
        self._current = None  # free this buffer before the next one is read
        if self._read:
            self._row, self._read = self._row + self._read, 0
            self._start = copy.deepcopy(self._stream.state_dict())
        self._fill()
        if not self._read:
            self._pass_ended()
            self._pass, self._row = self._pass + 1, 0
            self._open(None)

    def _fill(self) -> None:
        """Read the buffer at this position; if it has nothing to learn, there are no batches."""
        if self._rows is None:
            self._rows = iter(self._stream)
        first = self._first_row + self._row
        rows = read_rows(self._rows, self._buffer, first, self._source)
        self._read = len(rows)
        examples = self._encode(rows, first) if rows else []
        if examples:
            seed = int(np.random.SeedSequence([self._seed, self._pass, self._row]).generate_state(1)[0])
            self._current = batches(examples, **self._options, seed=seed, epochs=1)
