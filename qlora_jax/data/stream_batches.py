"""Batches of a set that is larger than memory: rows are read, tokenized and packed while training goes on.

    rows      r0 r1 r2 …                                        an IterableDataset, read from front to end, then again
    buffer    the next `buffer` rows, as examples               all that is ever held
    batches   those of batch.py for these examples: shuffled by (seed, pass, buffer), packed or padded

A buffer is used up before the next is read. So the position is small and exact: where the rows of this buffer begin
(`IterableDataset.state_dict`, which finds the place without reading what came before, shard by shard) and the number of its
next batch. Resuming reads and tokenizes one buffer again, and checks that it is the same. A sliding shuffle buffer, as
`IterableDataset.shuffle` has, would have to be saved whole.

What that costs: examples change places within a buffer only, and the last batch of a buffer is filled up with padding rows.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from qlora_jax.data.batch import Batch, BatchIterator, batches
from qlora_jax.data.format import Example
from qlora_jax.data.records import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

Row = dict[str, Any]


def read_rows(rows: Iterable[Row], count: int, first: int, source: str) -> list[Row]:
    """The next rows, at most `count`; `first` is the number of the first one in messages.

    Raises:
        DataError: rows that cannot be read.
    """
    try:
        return list(islice(rows, count))
    except Exception as error:  # of the readers of files and of the network beneath `datasets`
        raise DataError(
            f"{source}, in the {count} rows from row {first} on (counted from 0): expected rows that can be read, "
            f"found {type(error).__name__}: {error}"
        ) from error


class StreamBatches(grain.DatasetIterator[Batch]):
    """Endless batches of a stream of rows, with a position; see the module's docstring.

    Args:
        open_rows: makes the stream anew, at its beginning.
        encode: (rows, number of the first of them) → examples of at most `length` + 1 tokens, perhaps none.
        buffer: rows that are held at a time.
        batch_size, length, pad_id, packing, seed, group_by_length: as in `batches`.
        source: its name in messages.
        first_row: the number of its first row, for `encode` and in messages.
        pass_ended: called after the last row of each pass.

    Raises:
        ValueError: a buffer of less than one row, or what `batches` raises.
        DataError: on reading, rows that cannot be read, or a whole pass in which nothing is learned.
    """

    def __init__(
        self,
        open_rows: Callable[[], "IterableDataset"],
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
            raise ValueError(f"buffer: expected at least 1 row, found {buffer}")
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
        self._row = 0  # of the pass, with which this buffer begins
        self._read = 0  # rows of this buffer
        self._stream = open_rows()
        self._rows: Iterator[Row] | None = None
        self._start: dict[str, Any] = copy.deepcopy(self._stream.state_dict())  # of the stream, where this buffer begins
        self._current: BatchIterator | None = None

    def __next__(self) -> Batch:
        taught = self._pass  # the last pass that is known to teach something
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
        """Nobody knows before all rows were read."""
        return None

    def get_state(self) -> dict[str, Any]:
        """A JSON-able state: the place of the next batch."""
        return {
            "pass": self._pass,
            "row": self._row,
            "buffer": self._buffer,
            "stream": copy.deepcopy(self._start),
            "batches": None if self._current is None else self._current.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if state["buffer"] != self._buffer:
            raise ValueError(f"position of the data: expected a buffer of {state['buffer']} rows, found {self._buffer}")
        self._pass, self._row, self._read = int(state["pass"]), int(state["row"]), 0
        self._open(state["stream"])
        self._current = None
        if state["batches"] is not None:
            self._fill()
            if self._current is None:
                raise ValueError("position of the data: expected the data that it was saved with, found nothing there")
            self._current.set_state(state["batches"])

    def _open(self, position: dict[str, Any] | None) -> None:
        self._stream, self._rows = self._open_rows(), None
        if position is not None:
            self._stream.load_state_dict(copy.deepcopy(position))
        self._start = copy.deepcopy(self._stream.state_dict() if position is None else position)

    def _advance(self) -> None:
        """To the next buffer, or to the beginning where the stream has ended."""
        self._current = None  # before the next is read: one buffer at a time
        if self._read:
            self._row, self._read = self._row + self._read, 0
            self._start = copy.deepcopy(self._stream.state_dict())
        self._fill()
        if not self._read:
            self._pass_ended()
            self._pass, self._row = self._pass + 1, 0
            self._open(None)

    def _fill(self) -> None:
        """Reads the buffer that begins here; without anything to learn in it there are no batches."""
        if self._rows is None:
            self._rows = iter(self._stream)
        first = self._first_row + self._row
        rows = read_rows(self._rows, self._buffer, first, self._source)
        self._read = len(rows)
        examples = self._encode(rows, first) if rows else []
        if examples:
            seed = int(np.random.SeedSequence([self._seed, self._pass, self._row]).generate_state(1)[0])
            self._current = batches(examples, **self._options, seed=seed, epochs=1)
