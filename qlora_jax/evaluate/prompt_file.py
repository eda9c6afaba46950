"""Questions that models are to answer, from a file: the Vicuna benchmark's, or any others.

    {"question_id": 1, "text": "…"}             the text in one of the columns prompt, question, text and instruction
    {"messages": [{"role": "user", …}, …]}      a conversation that ends with the user
    a line of a .txt file                       a question

A row without a question_id has its number, counted from 1.
"""

from dataclasses import dataclass
from typing import Any

from qlora_jax.data import load_records
from qlora_jax.data.messages import Message
from qlora_jax.errors import DataError

__all__ = ["Prompt", "read_prompts"]

_TEXTS = ("prompt", "question", "text", "instruction")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        question_id: its id as in the file, a number or a text.
        messages: the conversation up to the answer.
    """

    question_id: int | str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """The question as a judge reads it: the text alone, or the turns of a conversation with their roles."""
        if len(self.messages) == 1:
            return str(self.messages[0]["content"])
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def read_prompts(source: str, *, split: str | None = None) -> list[Prompt]:
    """Return the questions of a file, a folder or a data set on the hub, in their order.

    Raises:
        DataError: a row without a question, with an unusable id, or with the id of a row before it.
        OSError: the source cannot be read.
    """
    found: dict[int | str, Prompt] = {}
    for number, row in enumerate(load_records(source, split), 1):
        place = f"{source}, row {number} (counted from 1)"
        question_id = row.get("question_id", number)
        if isinstance(question_id, bool) or not isinstance(question_id, int | str):
            raise DataError(f"{place}: expected a question_id that is a number or a text, found {question_id!r:.80}")
        if question_id in found:
            raise DataError(f"{place}: expected each question_id once, found {question_id!r} twice")
        found[question_id] = Prompt(question_id, _messages(row, place))
    return list(found.values())


def _messages(row: dict[str, Any], place: str) -> tuple[Message, ...]:
    messages = row.get("messages")
    if messages is None:
        texts = [row[name] for name in _TEXTS if row.get(name) is not None]
        if not texts:
            raise DataError(f"{place}: expected one of the columns messages, {', '.join(_TEXTS)}, found {', '.join(row)}")
        messages = [{"role": "user", "content": texts[0]}]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: expected messages, found {messages!r:.80}")
    for message in messages:
        fits = isinstance(message, dict) and message.get("role") in _ROLES
        if not fits or not isinstance(message.get("content"), str) or not message["content"].strip():
            raise DataError(f"{place}: expected messages of {', '.join(_ROLES)} with a text, found {message!r:.80}")
    if messages[-1]["role"] != "user":
        raise DataError(f"{place}: expected messages that end with the user's, found the role {messages[-1]['role']}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)
