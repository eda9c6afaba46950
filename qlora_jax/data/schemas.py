"""The schemas of rows: which columns a row has, the conversation that it becomes, and the template that `auto` takes.

    schema                 columns                       more columns      becomes
    messages               messages                      S T               itself
    alpaca                 instruction, output           input context S H T  user: instruction and input; assistant: output
    question/answer        question, answer              context S H T     user: context and question; assistant: answer
    input/output           input, output                 context S H T     user: context and input; assistant: output
    sharegpt               conversations                 S T               messages
    instruction/response   instruction, response         input context S H T  user: instruction and context; assistant
    prompt/completion      prompt, completion            S H T             user, assistant; or two lists of messages
    text                   text                          –                 the turns marked `### Human:`, `### Assistant:`;
                                                                           or no turns
    completion             completion                    –                 no turns: all of the text is learned

    S  system, system_prompt or system_message: the system message
    H  history: turns before the question, as messages or as pairs [question, answer]
    T  tools, or functions: what the conversation may call

The first schema of `SCHEMAS` whose columns are all there, and not missing, is taken; a file may mix schemas. With a system
message, a history or tools, `auto` is the chat template (guanaco for a tokenizer without one), because the other templates
have no place for them.

A schema is one value (`Schema`) and one line of `SCHEMAS`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qlora_jax.data.columns import nearest_schema
from qlora_jax.data.file_input import DamagedRow
from qlora_jax.data.messages import ROLE_KEYS, Message, checked_messages, checked_text, not_learned
from qlora_jax.data.more_columns import (
    MORE,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    column_text,
    earlier_messages,
    exchange,
    joined_texts,
    tools_of,
    with_system,
)
from qlora_jax.data.values import described, from_json, is_missing
from qlora_jax.errors import DataError

__all__ = [
    "SCHEMAS",
    "TURN_MARKER",
    "Record",
    "Schema",
    "Template",
    "checked_messages",
    "checked_text",
    "detect_schema",
    "parse",
    "present_columns",
    "split_turns",
]

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
        unused: the columns with a value that the schema does not use.
    """

    schema: str
    messages: tuple[Message, ...]
    fields: dict[str, str]
    tools: tuple[Any, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """A form of rows.

    Attributes:
        name: the name in reports.
        columns: the columns that a row has to have; others are allowed.
        parse: a row to its record; raises DataError for values of the wrong kind.
        template: (record, whether the tokenizer has a chat template) to the template that `auto` stands for.
        optional: more columns that `parse` uses.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[[Row], Record]
    template: Callable[[Record, bool], Template]
    optional: tuple[str, ...] = ()


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
    near = nearest_schema(found, {name: schema.columns for name, schema in SCHEMAS.items()})
    known = "; ".join(", ".join(schema.columns) for schema in SCHEMAS.values())
    way_out = near or f"--columns OURS=THEIRS renames columns; expected all those of one of: {known}"
    raise DataError(f"unknown schema: found the columns {sorted(map(str, found))}; {way_out}")


def present_columns(row: object) -> dict[str, Any]:
    """Return the columns of a row that have a value.

    Raises:
        DataError: this is no row.
    """
    if isinstance(row, DamagedRow):
        raise DataError(row.reason)
    if not isinstance(row, Mapping):
        raise DataError(f"expected an object with named columns, found {described(row)}")
    present = {name: value for name, value in row.items() if not is_missing(value)}
    if not present:
        raise DataError(f"expected a row with a value, found {f'nothing but nulls in {sorted(row)}' if row else 'none'}")
    return present


def parse(row: Any) -> Record:
    """Return the record of a row.

    Raises:
        DataError: the row is damaged, or has no known schema, or values of the wrong kind.
    """
    # A table that mixes schemas has empty texts where a row has no messages.
    lists = (*MESSAGES.columns, *SHAREGPT.columns)
    present = {name: value for name, value in present_columns(row).items() if value != "" or name not in lists}
    try:
        schema = SCHEMAS[detect_schema(present)]
    except DataError as error:
        empty = sorted(str(name) for name in row if name not in present)
        raise DataError(f"{error}{f' (null here: {empty})' if empty else ''}") from None
    used = {*schema.columns, *schema.optional}
    unused = tuple(name for name, value in present.items() if name not in used and value not in ("", [], {}))
    return replace(schema.parse(present), unused=unused)


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


def _unless_more(template: Callable[[Record, bool], Template]) -> Callable[[Record, bool], Template]:
    """Return the template, and for a record with more than one question and its answer, that of conversations."""

    def choose(record: Record, has_chat: bool) -> Template:
        if record.fields:
            return template(record, has_chat)
        return "chat" if has_chat else "guanaco"

    return choose


def _record(name: str, row: Row, question: str, answer: str, fields: dict[str, str]) -> Record:
    """Return the record of a question and its answer, with what comes before them."""
    before, tools = earlier_messages(row), tools_of(row)
    return Record(name, (*before, *exchange(question, answer)), {} if before or tools else fields, tools)


def _pair(name: str, question: str, answer: str, template: Callable[[Record, bool], Template]) -> Schema:
    """Return the schema of one question, perhaps with its context, and one answer in columns of these names."""

    def parse(row: Row) -> Record:
        column_text(row, question)
        asked, answered = joined_texts(row, "context", question), column_text(row, answer)
        return _record(name, row, asked, answered, {question: asked, answer: answered})

    return Schema(name, (question, answer), parse, _unless_more(template), ("context", *MORE))


def _instruction(name: str, answer: str) -> Schema:
    """Return the schema of an instruction with its answer in the column `answer` and, perhaps, more of it."""

    def parse(row: Row) -> Record:
        fields = {"instruction": column_text(row, "instruction"), "output": column_text(row, answer)}
        if more := joined_texts(row, "input", "context"):
            fields["input"] = more
        question = "\n\n".join(part for part in (fields["instruction"], fields.get("input", "")) if part)
        return _record(name, row, question, fields["output"], fields)

    return Schema(name, ("instruction", answer), parse, _unless_more(_always("alpaca")), ("input", "context", *MORE))


def _parse_messages(row: Row) -> Record:
    return Record("messages", with_system(row, checked_messages(row["messages"], "messages")), {}, tools_of(row))


def _parse_sharegpt(row: Row) -> Record:
    messages = checked_messages(row["conversations"], "conversations")
    return Record("sharegpt", with_system(row, messages), {}, tools_of(row))


def _parse_prompt_completion(row: Row) -> Record:
    """Return the record of two texts, or of two lists of messages, of which those of the completion are learned."""
    if not (_is_conversation(row["prompt"]) or _is_conversation(row["completion"])):
        texts = {column: column_text(row, column) for column in ("prompt", "completion")}
        return _record("prompt/completion", row, texts["prompt"], texts["completion"], texts)
    sides = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column]
        messages = (
            checked_messages(value, column)
            if _is_conversation(value)
            else ({"role": role, "content": column_text(row, column)},)
        )
        sides.append(messages)
    before = tuple(not_learned(message) if message["role"] == "assistant" else message for message in sides[0])
    history = earlier_messages({name: value for name, value in row.items() if name == "history"})
    return Record("prompt/completion", with_system(row, (*history, *before, *sides[1])), {}, tools_of(row))


def _is_conversation(value: object) -> bool:
    """Return whether a value is a list of messages, a message, or the JSON text of messages."""
    if isinstance(value, str):
        text = value.strip()
        if not (text.startswith("[{") and text.endswith("}]")):
            return False
        try:
            value = from_json(text, "")
        except DataError:
            return False
        return isinstance(value, list) and all(isinstance(one, dict) and one.keys() & {*ROLE_KEYS} for one in value)
    return isinstance(value, list | tuple | Mapping)


def _parse_text(row: Row) -> Record:
    text = column_text(row, "text")
    return Record("text", split_turns(text), {"text": text})


def _parse_completion(row: Row) -> Record:
    return Record("completion", (), {"text": column_text(row, "completion")})


def _guanaco_or_plain(record: Record, has_chat: bool) -> Template:
    return "guanaco" if TURN_MARKER.search(record.fields["text"]) else "plain"


_CHAT_COLUMNS = (*SYSTEM_COLUMNS, *TOOL_COLUMNS)
MESSAGES = Schema("messages", ("messages",), _parse_messages, _always("chat"), _CHAT_COLUMNS)
ALPACA = _instruction("alpaca", "output")
QUESTION_ANSWER = _pair("question/answer", "question", "answer", _chat_or_plain)
INPUT_OUTPUT = _pair("input/output", "input", "output", _chat_or_plain)
SHAREGPT = Schema("sharegpt", ("conversations",), _parse_sharegpt, _always("chat"), _CHAT_COLUMNS)
INSTRUCTION_RESPONSE = _instruction("instruction/response", "response")
# Whoever writes prompts has given them their form.
PROMPT_COMPLETION = Schema(
    "prompt/completion", ("prompt", "completion"), _parse_prompt_completion, _unless_more(_always("plain")), MORE
)
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
