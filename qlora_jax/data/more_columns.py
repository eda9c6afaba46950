"""Columns that are used beside those of a schema: the system message, earlier turns, and tools."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.data.messages import Message, checked_messages, checked_text, checked_tools, content_text
from qlora_jax.data.values import from_json
from qlora_jax.errors import DataError

__all__ = [
    "MORE",
    "SYSTEM_COLUMNS",
    "TOOL_COLUMNS",
    "column_text",
    "earlier_messages",
    "exchange",
    "joined_texts",
    "tools_of",
    "with_system",
]

Row = Mapping[str, Any]

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
TOOL_COLUMNS = ("tools", "functions")
# Columns that every schema of questions and answers uses.
MORE = (*SYSTEM_COLUMNS, "history", *TOOL_COLUMNS)


def column_text(row: Row, column: str) -> str:
    """Return the text of a column that the row has."""
    return checked_text(row[column], f"column {column!r}")


def exchange(question: str, answer: str) -> tuple[Message, ...]:
    """Return a question of the user and its answer."""
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def joined_texts(row: Row, *columns: str) -> str:
    """Return the texts of those columns that have one, with an empty line between them."""
    return "\n\n".join(text for name in columns if name in row and (text := column_text(row, name)))


def tools_of(row: Row) -> tuple[Any, ...]:
    """Return the tools of a row; the older form `functions` has them without their wrapping."""
    tools = checked_tools(row.get("tools"))
    if tools:
        return tools
    functions = checked_tools(row.get("functions"), "functions")
    return tuple(one if "function" in one else {"type": "function", "function": one} for one in functions)


def with_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages after the system message of a column, if there is one."""
    texts = {text: name for name in SYSTEM_COLUMNS if name in row and (text := content_text(row[name], f"column {name!r}"))}
    if not texts:
        return messages
    if len(texts) > 1:
        raise DataError(f"columns {', '.join(texts.values())}: expected one system message, found different ones")
    ((text, column),) = texts.items()
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() == text.strip():
            return messages
        raise DataError(f"column {column!r}: expected no system message in the conversation beside it, found another one")
    return ({"role": "system", "content": text}, *messages)


def earlier_messages(row: Row) -> tuple[Message, ...]:
    """Return the system message and the turns of the column `history` of a row."""
    history = row.get("history")
    if isinstance(history, str) and history.strip():
        history = from_json(history, "column 'history'")
    if isinstance(history, list | tuple) and history and all(isinstance(turn, list | tuple) for turn in history):
        turns: list[Message] = []
        for index, turn in enumerate(history):
            place = f"column 'history', turn {index}"
            if len(turn) != 2:
                raise DataError(f"{place}: expected a question and its answer, found {len(turn)} values")
            turns += exchange(*(checked_text(text, place) for text in turn))
        return with_system(row, tuple(turns))
    return with_system(row, checked_messages(history, "history") if history else ())
