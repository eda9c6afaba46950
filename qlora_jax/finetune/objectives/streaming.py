"""A data set that is streamed: its first rows are held out, and the others are read during training."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_jax.data import TREE_COLUMNS, DataError, Example, NothingToLearn, Report, StreamBatches, read_rows, stream_records
from qlora_jax.finetune.objectives.corpus import Corpus, named_errors, read_source

if TYPE_CHECKING:
    from datasets import IterableDataset

    from qlora_jax.finetune.options.data import DataOptions
    from qlora_jax.finetune.options.options import Options

SAMPLE = 100  # rows that are read before the run
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """The source of the rows, and the function that makes examples of them (`encode_all` with the options of the run)."""

    source: str
    split: str | None
    held_out_rows: int
    encode: Callable[..., tuple[list[Example], Report]]

    def rows(self) -> "IterableDataset":
        """Return the rows to train on."""
        return stream_records(self.source, self.split).skip(self.held_out_rows)

    def batches(self, options: "Options", *, rows: int, pad_id: int) -> StreamBatches:
        """Return batches of so many rows.

        Log what became of the rows at the end of each pass over them (of those read since the run was resumed, if it was),
        and before that of every buffer in which nothing is learned.
        """
        total: Report | None = None

        def encode(records: list[dict[str, Any]], first: int) -> list[Example]:
            nonlocal total
            with named_errors(self.source):
                try:
                    examples, report = self.encode(records, first_row=first, progress=False)
                except NothingToLearn as error:
                    examples, report = [], error.report
                    last = first + len(records) - 1
                    _logger.info("%s, rows %d to %d (counted from 0): %s", self.source, first, last, report)
            total = report if total is None else total + report
            return examples

        def pass_ended() -> None:
            nonlocal total
            if total is not None:
                _logger.info("%s: at the end of the rows to train on: %s", self.source, total)
            total = None

        return StreamBatches(
            self.rows,
            encode,
            buffer=options.data.shuffle_buffer,
            batch_size=rows,
            length=options.data.max_length,
            pad_id=pad_id,
            packing=options.data.packs,
            seed=options.run.seed,
            group_by_length=options.data.group_by_length,
            source=self.source,
            first_row=self.held_out_rows,
            pass_ended=pass_ended,
        )


def open_stream(data: "DataOptions", encode: Callable[..., tuple[list[Example], Report]]) -> tuple[Stream, Corpus[Example]]:
    """Return the stream that `data` names, and a corpus of the held-out examples only.

    The first rows to train on are read before any long work; their template is taken for that of all rows.

    Raises:
        DataError, OSError: data that cannot be used, or nothing to train on.
    """
    source, held_out = data.sources[0], []
    stream = Stream(source, data.split, 0 if data.eval_data is not None else data.held_out_rows, encode)
    if data.eval_data is not None:
        held_out, _ = read_source(data.eval_data, data.eval_split, encode)
    elif stream.held_out_rows:
        first = _first_rows(stream_records(source, data.split), stream.held_out_rows, 0, source)
        with named_errors(source):
            held_out, report = encode(first, progress=False)
        _logger.info("%s: held out are the first rows: %s", source, report)
    rows = _first_rows(stream.rows(), SAMPLE, stream.held_out_rows, source)
    if not rows:
        raise DataError(f"{source}: expected rows beyond those held out (held_out_rows {stream.held_out_rows}), found none")
    with named_errors(source):
        _, report = encode(rows, first_row=stream.held_out_rows, progress=False)
    _logger.info("%s: streamed; of its first rows to train on %s", source, report)
    form = max(report.templates, key=report.templates.__getitem__)
    return stream, Corpus([], held_out[: data.max_eval_samples], form)


def _first_rows(stream: "IterableDataset", count: int, number: int, source: str) -> list[dict[str, Any]]:
    """Return at most `count` rows; `number` is the number of the first one in messages."""
    rows = read_rows(stream.take(count), count, number, source)
    if any(row.keys() >= TREE_COLUMNS for row in rows):
        raise DataError(
            f"{source}: streaming: expected rows that stand alone, found message trees "
            f"(columns {', '.join(sorted(TREE_COLUMNS))}), which are read whole"
        )
    return rows
