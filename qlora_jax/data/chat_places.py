"""Where the text of a chat template has the content of a message.

The text of a short message may occur in several places: `user` is also the name of a role, and a question may be asked
twice. Then the template writes the conversation once more, with a mark in place of the content.
"""

from collections.abc import Callable, Sequence

from qlora_jax.data.chat_checks import REASONING_TAGS, forms_of_text
from qlora_jax.data.chat_forms import text_of
from qlora_jax.data.messages import Message
from qlora_jax.data.pieces import Span
from qlora_jax.errors import DataError

__all__ = ["content_place"]

_MARK = "\ue000\ue001"


def content_place(
    messages: Sequence[Message], index: int, text: str, write: Callable[[Sequence[Message]], str], start: int
) -> Span | None:
    """Return the (start, end) of the content of a message, without its reasoning, in a text; None if it is not found.

    Args:
        messages: the messages that the text was written of.
        index: the number of the message.
        text: starts with what `write` returns for the messages.
        write: writes messages as a text.
        start: where the search starts. If the place is not certain, it is the first one from there on.
    """
    *_, content = REASONING_TAGS.split(text_of(messages[index]))
    form = next((form for form in forms_of_text(content.strip()) if form in text[start:]), "")
    if not form:
        return None
    if text.count(form) > 1 and (place := _marked_place(messages, index, text, write)) is not None:
        return place
    found = text.find(form, start)
    return found, found + len(form)


def _marked_place(
    messages: Sequence[Message], index: int, text: str, write: Callable[[Sequence[Message]], str]
) -> Span | None:
    """Return the place of a content by a mark; None if the template writes the mark otherwise than the content."""
    message, content = messages[index], text_of(messages[index])
    marked = content.removesuffix(REASONING_TAGS.split(content)[-1]) + _MARK
    part = marked if isinstance(message["content"], str) else [{"type": "text", "text": marked}]
    changed = [*messages[:index], message | {"content": part}, *messages[index + 1 :]]
    try:
        written = write(messages)
        before, mark, after = write(changed).partition(_MARK)
    except DataError:  # the template refuses such a content
        return None
    end = len(written) - len(after)
    around = written.startswith(before) and written.endswith(after) and len(before) < end
    return (len(before), end) if mark and around and text.startswith(written) else None
