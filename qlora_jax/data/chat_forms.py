"""The forms in which chat templates expect a conversation.

Templates disagree on details of the messages. A template that does not know a form fails, or drops a part:

    system role       Gemma and others refuse it; the text is then written at the start of the first user turn
    content           templates of models that also read pictures expect a list of parts in place of a text
    arguments         of a call: an object for most templates, JSON text for DeepSeek's
    ids of calls      Mistral expects nine letters or digits; FunctionGemma expects the name of the function in its response
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_jax.data.messages import Message

__all__ = ["SYSTEM_IN_USER_TURN", "Form", "forms_of", "text_of"]

SYSTEM_IN_USER_TURN = (
    "system message written at the start of the first user turn, because the chat template has no system role"
)
_ID_LENGTH = 9
Messages = Sequence[Message]


@dataclass(frozen=True)
class Form:
    """A conversation in one of the forms.

    Attributes:
        messages: the messages to render.
        removed: the number of messages at the start that were joined with the one after them.
        notes: what a user should know about the form.
    """

    messages: tuple[Message, ...]
    removed: int = 0
    notes: tuple[str, ...] = ()


def forms_of(messages: Messages, *, parts: bool = True) -> Iterator[Form]:
    """Yield the conversation as it is, then in every form that differs from it in one or two of the details.

    Args:
        messages: the conversation.
        parts: whether content as a list of parts is among the forms.
    """
    known = [change for change in _CHANGES if parts or change is not _content_in_parts]
    for count in range(3):
        for changes in itertools.combinations(known, count):
            form: Form | None = Form(tuple(messages))
            for change in changes:
                form = None if form is None else change(form)
            if form is not None:
                yield form


def text_of(message: Message) -> str:
    """Return the content of a message as text, whether it is a text or a list of parts."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return content if isinstance(content, str) else ""


# Each change returns None for a conversation in which there is nothing to change.


def _system_in_user_turn(form: Form) -> Form | None:
    messages = form.messages
    count = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count == 0 or count == len(messages) or messages[count]["role"] != "user":
        return None
    text = "\n\n".join(part for message in messages[: count + 1] if (part := text_of(message)))
    first = messages[count] | {"content": text}
    return Form((first, *messages[count + 1 :]), count, (*form.notes, SYSTEM_IN_USER_TURN))


def _content_in_parts(form: Form) -> Form | None:
    messages = tuple(message | {"content": [{"type": "text", "text": text_of(message)}]} for message in form.messages)
    return Form(messages, form.removed, form.notes)


def _arguments_as_text(form: Form) -> Form | None:
    def change(call: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"].get("arguments", {}), ensure_ascii=False)
        return call | {"function": call["function"] | {"arguments": arguments}}

    return _with_calls(form, lambda _, calls: [change(call) for call in calls])


def _completed_calls(form: Form) -> Form | None:
    """Give each call an id of nine characters, and each response that id and the name of the function."""
    short: dict[Any, str] = {}  # the id in the data → the id of nine characters
    names: dict[str, str] = {}
    waiting: list[str] = []  # calls without a response so far
    messages: list[Message] = []
    for index, message in enumerate(form.messages):
        if message["role"] == "tool":
            call_id = short.get(message.get("tool_call_id")) or (waiting[0] if waiting else None)
            if call_id is not None:
                if call_id in waiting:
                    waiting.remove(call_id)
                message = {"name": names[call_id]} | message | {"tool_call_id": call_id}
        elif message.get("tool_calls"):
            calls = []
            for number, call in enumerate(message["tool_calls"]):
                given = call.get("id", f"{index}.{number}")
                short[given] = call_id = _short_id(str(given))
                names[call_id] = call["function"]["name"]
                waiting.append(call_id)
                calls.append(call | {"id": call_id})
            message = message | {"tool_calls": calls}
        messages.append(message)
    return Form(tuple(messages), form.removed, form.notes) if short else None


def _short_id(given: str) -> str:
    if len(given) == _ID_LENGTH and given.isalnum():
        return given
    return hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:_ID_LENGTH]


def _with_calls(form: Form, change: Callable[[int, list[Any]], list[Any]]) -> Form | None:
    if not any(message.get("tool_calls") for message in form.messages):
        return None
    messages = tuple(
        message | {"tool_calls": change(index, message["tool_calls"])} if message.get("tool_calls") else message
        for index, message in enumerate(form.messages)
    )
    return Form(messages, form.removed, form.notes)


_CHANGES: tuple[Callable[[Form], Form | None], ...] = (
    _system_in_user_turn,
    _content_in_parts,
    _arguments_as_text,
    _completed_calls,
)
