"""A data set that is streamed: its first rows are held out, and the others are read while the run trains."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_jax.data import TREE_COLUMNS, DataError, Example, NothingToLearn, Report, StreamBatches, read_rows, stream_records
from qlora_jax.finetune.objectives.corpus import Corpus, Say, named_errors, read_source

if TYPE_CHECKING:
    from datasets import IterableDataset

    from qlora_jax.finetune.options.data import DataOptions
    from qlora_jax.finetune.options.options import Options

SAMPLE = 100  # rows that are looked at before the run


@dataclass(frozen=True)
class Stream:
    """Where the rows come from and how they become examples (`encode_all` with the options of the run)."""

    source: str
    split: str | None
    held_out_rows: int
    encode: Callable[..., tuple[list[Example], Report]]
    say: Say

    def rows(self) -> "IterableDataset":
        """The rows to train on."""
        return stream_records(self.source, self.split).skip(self.held_out_rows)

    def batches(self, options: "Options", *, rows: int, pad_id: int) -> StreamBatches:
        """`rows` a batch.

        At the end of each pass `say` hears what became of its rows (of those read since the run went on, if it had been
        stopped), and before that of every buffer that teaches nothing.
        """
        total: Report | None = None

        def encode(records: list[dict[str, Any]], first: int) -> list[Example]:
            nonlocal total
            with named_errors(self.source):
                try:
                    examples, report = self.encode(records, first_row=first, progress=False)
                except NothingToLearn as error:
                    examples, report = [], error.report
                    self.say(f"{self.source}, rows {first} to {first + len(records) - 1} (counted from 0): {report}")
            total = report if total is None else total + report
            return examples

        def pass_ended() -> None:
            nonlocal total
            if total is not None:
                self.say(f"{self.source}: at the end of the rows to train on: {total}")
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


def open_stream(
    data: "DataOptions", encode: Callable[..., tuple[list[Example], Report]], say: Say
) -> tuple[Stream, Corpus[Example]]:
    """The stream that `data` names, and the held-out examples of the run, with nothing else to train on.

    The first rows to train on are looked at before any long work, and say which form the rows have.

    Raises:
        DataError, OSError: data that cannot be used, or nothing to train on.
    """
    source, held_out = data.sources[0], []
    stream = Stream(source, data.split, 0 if data.eval_data is not None else data.held_out_rows, encode, say)
    if data.eval_data is not None:
        held_out, _ = read_source(data.eval_data, data.eval_split, encode, say)
    elif stream.held_out_rows:
        first = _first_rows(stream_records(source, data.split), stream.held_out_rows, 0, source)
        with named_errors(source):
            held_out, report = encode(first, progress=False)
        say(f"{source}: held out are the first rows: {report}")
    rows = _first_rows(stream.rows(), SAMPLE, stream.held_out_rows, source)
    if not rows:
        raise DataError(f"{source}: expected rows beyond those held out (held_out_rows {stream.held_out_rows}), found none")
    with named_errors(source):
        _, report = encode(rows, first_row=stream.held_out_rows, progress=False)
    say(f"{source}: streamed; of its first rows to train on {report}")
    form = max(report.templates, key=report.templates.__getitem__)
    return stream, Corpus([], held_out[: data.max_eval_samples], form)


def _first_rows(stream: "IterableDataset", count: int, number: int, source: str) -> list[dict[str, Any]]:
    """At most `count` rows; `number` is that of the first one in messages."""
    rows = read_rows(stream.take(count), count, number, source)
    if any(row.keys() >= TREE_COLUMNS for row in rows):
        raise DataError(
            f"{source}: streaming: expected rows that stand alone, found message trees "
            f"(columns {', '.join(sorted(TREE_COLUMNS))}), which are read whole"
        )
    return rows
