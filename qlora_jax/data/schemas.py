"""The schemas of rows: which columns a row has, the conversation that it becomes, and the template that `auto` takes.

    schema                 columns                            becomes
    messages               messages, [tools]                  itself
    alpaca                 instruction, output, [input]       user: instruction and input; assistant: output
    question/answer        question, answer                   user, assistant
    input/output           input, output                      user, assistant
    sharegpt               conversations, [system], [tools]   messages
    instruction/response   instruction, response, [context]   user: instruction and context; assistant: response
    prompt/completion      prompt, completion                 user, assistant
    text                   text                               the turns marked `### Human:`, `### Assistant:`; or no turns
    completion             completion                         no turns: all of the text is learned

The first schema of `SCHEMAS` whose columns are all there, and not null, is taken: a JSON file that mixes schemas has the
union of their columns, with null where a row has none.

A schema is one value (`Schema`) and one line of `SCHEMAS`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_jax.data.messages import Message, checked_messages, checked_text, checked_tools
from qlora_jax.errors import DataError

__all__ = ["SCHEMAS", "TURN_MARKER", "Record", "Schema", "Template", "detect_schema", "parse", "split_turns"]

Row = Mapping[str, Any]
Template = Literal["auto", "chat", "guanaco", "alpaca", "plain"]

TURN_MARKER = re.compile(r"### (Human|Assistant):")
_ROLE_OF_MARKER = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Record:
    """One row after parsing.

    Attributes:
        schema: the name of its schema.
        messages: the conversation; empty for a text without turns.
        fields: text columns. An instruction has `instruction`, `output` and perhaps `input`, whatever its columns are
            called; a text has `text`. The template alpaca reads the first form, guanaco and plain read the second. Without
            these fields, alpaca and plain need exactly one user message and one assistant message after it. A system
            message works with chat and guanaco only.
        tools: the tools that the conversation may call.
    """

    schema: str
    messages: tuple[Message, ...]
    fields: dict[str, str]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Schema:
    """A form of rows.

    Attributes:
        name: the name in reports.
        columns: the columns that a row has to have; others are allowed.
        parse: a row to its record; raises DataError for values of the wrong kind.
        template: (record, whether the tokenizer has a chat template) to the template that `auto` stands for.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[[Row], Record]
    template: Callable[[Record, bool], Template]


def detect_schema(columns: Iterable[str]) -> str:
    """Return the name of the schema that has these columns.

    Raises:
        DataError: no schema has.
    """
    found = set(columns)
    for name, schema in SCHEMAS.items():
        if found.issuperset(schema.columns):
            return name
    if found.issuperset(("chosen", "rejected")):
        raise DataError(
            "preference pairs (chosen, rejected): expected one answer to learn, found two; --objective dpo learns from pairs"
        )
    known = "; ".join(f"{name}: {', '.join(schema.columns)}" for name, schema in SCHEMAS.items())
    raise DataError(f"unknown schema: found the columns {sorted(found)}, expected all those of one of: {known}")


def parse(row: Row) -> Record:
    """Return the record of a row of a table.

    Raises:
        DataError: the row has no known schema, or values of the wrong kind.
    """
    try:
        name = detect_schema(name for name, value in row.items() if value is not None)
    except DataError as error:
        empty = sorted(name for name, value in row.items() if value is None)
        raise DataError(f"{error}{f' (null here: {empty})' if empty else ''}") from None
    return SCHEMAS[name].parse(row)


def split_turns(text: str) -> tuple[Message, ...]:
    """Return the turns of a flat text, none without a marker; a text before the first marker is the system message."""
    markers = list(TURN_MARKER.finditer(text))
    if not markers:
        return ()
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    turns = [
        {"role": _ROLE_OF_MARKER[marker.group(1)], "content": text[marker.end() : end].strip()}
        for marker, end in zip(markers, ends, strict=True)
    ]
    preamble = text[: markers[0].start()].strip()
    return tuple([{"role": "system", "content": preamble}] if preamble else []) + tuple(turns)


def _always(template: Template) -> Callable[[Record, bool], Template]:
    return lambda record, has_chat: template


def _chat_or_plain(record: Record, has_chat: bool) -> Template:
    return "chat" if has_chat else "plain"


def _text(row: Row, column: str) -> str:
    return checked_text(row[column], f"column {column!r}")


def _exchange(question: str, answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def _pair(name: str, question: str, answer: str, template: Callable[[Record, bool], Template]) -> Schema:
    """Return the schema of one question and one answer in columns of these names."""

    def parse(row: Row) -> Record:
        fields = {column: _text(row, column) for column in (question, answer)}
        return Record(name, _exchange(*fields.values()), fields)

    return Schema(name, (question, answer), parse, template)


def _instruction(name: str, more: str, answer: str) -> Schema:
    """Return the schema of an instruction with its answer in the column `answer` and, perhaps, more of it in `more`."""

    def parse(row: Row) -> Record:
        fields = {"instruction": _text(row, "instruction"), "output": _text(row, answer)}
        if row.get(more) is not None:
            fields["input"] = _text(row, more)
        question = "\n\n".join(part for part in (fields["instruction"], fields.get("input", "")) if part)
        return Record(name, _exchange(question, fields["output"]), fields)

    return Schema(name, ("instruction", answer), parse, _always("alpaca"))


def _parse_messages(row: Row) -> Record:
    return Record("messages", checked_messages(row["messages"], "messages"), {}, checked_tools(row.get("tools")))


def _parse_sharegpt(row: Row) -> Record:
    messages = checked_messages(row["conversations"], "conversations")
    if row.get("system"):
        if messages and messages[0]["role"] == "system":
            raise DataError("column 'system': expected no system message in the conversation beside it, found one")
        messages = ({"role": "system", "content": _text(row, "system")}, *messages)
    return Record("sharegpt", messages, {}, checked_tools(row.get("tools")))


def _parse_text(row: Row) -> Record:
    text = _text(row, "text")
    return Record("text", split_turns(text), {"text": text})


def _parse_completion(row: Row) -> Record:
    return Record("completion", (), {"text": _text(row, "completion")})


def _guanaco_or_plain(record: Record, has_chat: bool) -> Template:
    return "guanaco" if TURN_MARKER.search(record.fields["text"]) else "plain"


MESSAGES = Schema("messages", ("messages",), _parse_messages, _always("chat"))
ALPACA = _instruction("alpaca", "input", "output")
QUESTION_ANSWER = _pair("question/answer", "question", "answer", _chat_or_plain)
INPUT_OUTPUT = _pair("input/output", "input", "output", _chat_or_plain)
SHAREGPT = Schema("sharegpt", ("conversations",), _parse_sharegpt, _always("chat"))
INSTRUCTION_RESPONSE = _instruction("instruction/response", "context", "response")
# Whoever writes prompts has given them their form.
PROMPT_COMPLETION = _pair("prompt/completion", "prompt", "completion", _always("plain"))
TEXT = Schema("text", ("text",), _parse_text, _guanaco_or_plain)
COMPLETION = Schema("completion", ("completion",), _parse_completion, _guanaco_or_plain)

# Every schema by its name, in the order in which they are tried.
SCHEMAS: dict[str, Schema] = {
    MESSAGES.name: MESSAGES,
    ALPACA.name: ALPACA,
    QUESTION_ANSWER.name: QUESTION_ANSWER,
    INPUT_OUTPUT.name: INPUT_OUTPUT,
    SHAREGPT.name: SHAREGPT,
    INSTRUCTION_RESPONSE.name: INSTRUCTION_RESPONSE,
    PROMPT_COMPLETION.name: PROMPT_COMPLETION,
    TEXT.name: TEXT,
    COMPLETION.name: COMPLETION,
}
