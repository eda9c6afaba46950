"""A data set that is streamed: its first rows are held out, and the others are read during training."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_jax.data import (
    TREE_COLUMNS,
    ColumnNames,
    DataError,
    Example,
    NothingToLearn,
    Report,
    RowStream,
    StreamBatches,
    open_source,
    read_rows,
    stream_records,
    stream_source,
)
from qlora_jax.finetune.objectives.corpus import Corpus, named_errors, read_source

if TYPE_CHECKING:
    from qlora_jax.finetune.options.data import DataOptions
    from qlora_jax.finetune.options.options import Options

SAMPLE = 100  # rows that are read before the run
ROWS_TO_JUDGE = 1000  # rows after which those that cannot be used are compared with all, and not only at the end of a pass
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """The source of the rows, and the function that makes examples of them (`encode_all` with the options of the run)."""

    source: str
    split: str | None
    columns: ColumnNames
    held_out_rows: int
    encode: Callable[..., tuple[list[Example], Report]]

    def open(self) -> RowStream:
        """Return all rows."""
        return stream_source(self.source, self.split, self.columns)

    def rows(self) -> RowStream:
        """Return the rows to train on."""
        return self.open().skip(self.held_out_rows)

    def batches(self, options: "Options", *, rows: int, pad_id: int) -> StreamBatches:
        """Return batches of so many rows.

        Log what became of the rows at the end of each pass over them (of those read since the run was resumed, if it was),
        and before that of every buffer in which nothing is learned.
        """
        total: Report | None = None

        def encode(records: list[Any], first: int) -> list[Example]:
            nonlocal total
            with named_errors(self.source):
                try:
                    examples, report = self.encode(records, first_row=first, progress=False)
                except NothingToLearn as error:
                    examples, report = [], error.report
                    last = first + len(records) - 1
                    _logger.info("%s, rows %d to %d (counted from 0): %s", self.source, first, last, report)
            total = report if total is None else total + report
            if total.rows >= ROWS_TO_JUDGE:
                check(total)
            return examples

        def check(report: Report) -> None:
            with named_errors(self.source):
                report.check_bad_rows()

        def pass_ended() -> None:
            nonlocal total
            if total is not None:
                check(total)
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
    columns = data.column_names
    stream = Stream(source, data.split, columns, 0 if data.eval_data is not None else data.held_out_rows, encode)
    if data.eval_data is not None:
        held_out, _ = read_source(data.eval_data, open_source(data.eval_data, data.eval_split, columns), encode)
    elif stream.held_out_rows:
        first = _first_rows(stream.open(), stream.held_out_rows, 0, source)
        with named_errors(source):
            held_out, report = encode(first, progress=False)
        _logger.info("%s: held out are the first rows: %s", source, report)
    if columns.pairs:
        named = _first_rows(stream_records(source, data.split), ROWS_TO_JUDGE, 0, source)
        columns.check({name for row in named if isinstance(row, dict) for name in row})
    report = _sampled(stream)
    _logger.info("%s: streamed; of its first rows to train on %s", source, report)
    form = max(report.templates, key=report.templates.__getitem__)
    return stream, Corpus([], held_out[: data.max_eval_samples], form)


def _sampled(stream: Stream) -> Report:
    """Return the report of the first rows to train on; of more of them, if most of the first ones cannot be used.

    Raises:
        DataError: there are no rows, too many of them cannot be used, or none has anything to learn.
    """
    for count in (SAMPLE, ROWS_TO_JUDGE):
        rows = _first_rows(stream.rows(), count, stream.held_out_rows, stream.source)
        if not rows:
            held_out = f"held_out_rows {stream.held_out_rows}"
            raise DataError(
                f"{stream.source}: expected rows beyond those held out ({held_out}), found none; lower held_out_rows"
            )
        with named_errors(stream.source):
            try:
                _, report = stream.encode(rows, first_row=stream.held_out_rows, progress=False)
                report.check_bad_rows()
                return report
            except DataError:
                if len(rows) < count or count == ROWS_TO_JUDGE:
                    raise
    raise AssertionError("the last sample returns or raises")


def _first_rows(stream: RowStream, count: int, number: int, source: str) -> list[Any]:
    """Return at most `count` rows; `number` is the number of the first one in messages."""
    rows = read_rows(iter(stream), count, number, source)
    if any(isinstance(row, dict) and row.keys() >= TREE_COLUMNS for row in rows):
        raise DataError(
            f"{source}: streaming: expected rows that stand alone, found message trees "
            f"(columns {', '.join(sorted(TREE_COLUMNS))}), which are read whole"
        )
    return rows
