"""Whether the text that a chat template wrote holds all of a conversation.

Templates change white space and case, write texts as strings of JSON or Python, take switches out of messages (`/think`,
`/no_think`), and move the reasoning in an answer. So texts are compared without white space, switches and case, as they are
and in the escapes of these languages, and the parts of an answer around the tags of its reasoning one by one.

A template also drops the reasoning of earlier answers, in prompts as well. So only an answer that is learned has to be there
with all of its parts.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.data.chat_forms import text_of
from qlora_jax.data.messages import Message, called_names
from qlora_jax.errors import DataError

__all__ = [
    "REASONING_TAGS",
    "Dropped",
    "check_answer",
    "check_message",
    "check_prompt",
    "check_tools",
    "forms_of_text",
    "tool_name",
    "written",
]

REASONING_TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning|reason)>|\[/?THINK\]")
_NOT_COMPARED = re.compile(r"\s+|/(?:no_?)?think\b")
_TRY = "choose a chat template that writes it (chat_template: a file, or a name such as chatml)"


class Dropped(DataError):
    """A chat template leaves out a part of a conversation: of message number `index`, or the tools (-1)."""

    def __init__(self, reason: str, index: int = -1) -> None:
        super().__init__(reason)
        self.index = index


def check_prompt(messages: Sequence[Message], tools: Sequence[Any], text: str, first: int = 0) -> None:
    """Raise DataError if a tool or a message other than the assistant's is not in the text; messages count from `first`."""
    check_tools(tools, text)
    for index, message in enumerate(messages, first):
        if message["role"] != "assistant":
            check_message(index, message, [text])


def check_tools(tools: Sequence[Any], text: str) -> None:
    """Raise DataError if the name of a tool is not in the text."""
    for tool in tools:
        if (name := tool_name(tool)) not in text:
            raise Dropped(f"the chat template drops the tools of this conversation, found no {name!r} in its text; {_TRY}")


def tool_name(tool: Any) -> str:
    """Return the name of a tool's function."""
    return str(tool.get("function", tool).get("name", ""))


def check_message(index: int, message: Message, texts: Sequence[str]) -> None:
    """Raise DataError if the content of message number `index` is in none of the texts."""
    content = text_of(message)
    if not any(written(content, text) for text in texts):
        raise _dropped("content", index, message, content)


def check_answer(index: int, message: Message, text: str) -> None:
    """Raise DataError if a part of an answer is not in its text: content, reasoning, calls.

    Args:
        index: the number of the message, for the error.
        message: the answer.
        text: what the template wrote of it.
    """
    for what, part in _parts(message):
        if not written(part, text):
            raise _dropped(what, index, message, part)


def _dropped(what: str, index: int, message: Message, part: str) -> Dropped:
    place = f"message {index} ({message['role']})"
    return Dropped(f"the chat template drops the {what} of {place}, found no {_short(part)} in its text; {_TRY}", index)


def written(part: str, text: str) -> bool:
    """Return whether a text holds a part, apart from white space and the escapes of JSON and Python."""
    part = part.strip()
    if part in text:
        return True
    squeezed = _squeezed(text)
    return any(_squeezed(form) in squeezed for form in forms_of_text(part))


def forms_of_text(text: str) -> tuple[str, ...]:
    """Return a text as it is, and as it is within a string of JSON or Python."""
    single = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], repr(text)[1:-1], single


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    content = text_of(message)
    for part in REASONING_TAGS.split(content):
        yield "content", part
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        yield "reasoning", reasoning
    for name in called_names(message):
        yield "call", name
    for call in message.get("tool_calls", ()):
        for value in _texts_in(call["function"].get("arguments")):
            yield "call's argument", value


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts_in(part)
    elif isinstance(value, str):
        yield value


def _squeezed(text: str) -> str:
    return _NOT_COMPARED.sub("", text).casefold()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 40 else line[:40] + "…")
