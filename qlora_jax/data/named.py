"""The data sets of the QLoRA authors' program, by its names.

    name            hub id                              learned text, and the text before it
    alpaca          tatsu-lab/alpaca                    the output, after Alpaca's prompt
    alpaca-clean    yahma/alpaca-cleaned                the same
    chip2           laion/OIG, unified_chip2.jsonl      what follows `<bot>: `, after what follows `<human>: `
    self-instruct   yizhongw/self_instruct              the completion, after the prompt as it is
    hh-rlhf         Anthropic/hh-rlhf                   the whole text of `chosen`, questions too
    oasst1          timdettmers/openassistant-guanaco   the whole `text`, questions too
    longform        akoksal/LongForm                    the output, after the input as it is
    flan            SirNeural/flan_v2                   the targets, after the inputs as they are

Their program mentions FLAN v2 but never reads it; the hub id here is that of a public copy with about a hundred million
rows.

A row is converted to one of our schemas for which `--template auto` gives the same text as their program: all of a
`completion` is learned, and `prompt` and `completion` are joined without a separator. If a local file has the same name, the
file is read instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_jax.data.messages import checked_text
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
_BOT = "\n<bot>: "


@dataclass(frozen=True)
class NamedSet:
    """The hub id of a data set, and the conversion of its rows to our schemas."""

    hub: str
    convert: Callable[[Row], dict[str, Any]]
    options: dict[str, str] = field(default_factory=dict)  # more arguments for datasets.load_dataset
    split: str = "train"


def convert_named(name: str, records: "Dataset") -> "Dataset":
    """Convert the rows of a named data set to rows of our schemas.

    Raises:
        DataError: a row cannot be converted; the error contains its number.
    """

    def convert(row: Row, index: int) -> dict[str, Any]:
        try:
            return NAMED[name].convert(row)
        except DataError as error:
            raise DataError(f"{name}, row {index} (counted from 0): {error}") from error

    # `map` changes the type of an exception only with several processes.
    return records.map(convert, with_indices=True, remove_columns=records.column_names, desc=f"reading {name}")


def _columns(**names: str) -> Callable[[Row], dict[str, Any]]:
    """Return a function that converts a row, given the data set's name of each of our columns."""

    def convert(row: Row) -> dict[str, Any]:
        return {ours: checked_text(row.get(theirs), f"column {theirs!r}") for ours, theirs in names.items()}

    return convert


def _chip2(row: Row) -> dict[str, Any]:
    text = checked_text(row.get("text"), "column 'text'")
    question, *answers = text.split(_BOT)
    if not answers:
        raise DataError(f"column 'text': expected {_BOT!r} before the answer, found {text!r:.60}")
    # As in the authors' program: only the first answer, without the turns after it.
    return {"prompt": question.replace("<human>: ", ""), "completion": answers[0]}


_ALPACA = _columns(instruction="instruction", input="input", output="output")
NAMED = {
    "alpaca": NamedSet("tatsu-lab/alpaca", _ALPACA),
    "alpaca-clean": NamedSet("yahma/alpaca-cleaned", _ALPACA),
    "chip2": NamedSet("laion/OIG", _chip2, {"data_files": "unified_chip2.jsonl"}),
    "self-instruct": NamedSet(
        "yizhongw/self_instruct", _columns(prompt="prompt", completion="completion"), {"name": "self_instruct"}
    ),
    "hh-rlhf": NamedSet("Anthropic/hh-rlhf", _columns(completion="chosen")),
    "oasst1": NamedSet("timdettmers/openassistant-guanaco", _columns(completion="text")),
    "longform": NamedSet("akoksal/LongForm", _columns(prompt="input", completion="output")),
    "flan": NamedSet("SirNeural/flan_v2", _columns(prompt="inputs", completion="targets")),
}
# Names that the paper or the program mentions but that have no data set.
WITHOUT_SOURCE = {
    "unnatural-instructions": "the authors' program announces it and never reads it",
    "vicuna": "its training data were not released",
}
